"""Answers are valid against OpenAI's own schemas."""

import pytest
from jsonschema import ValidationError

from serve_app.protocol import FinishReason
from tests.api.harness import CHAT, COMPLETIONS, MODEL, Service, events
from tests.api.specification import conform
from tests.fakes import FakeEngine


@pytest.mark.parametrize("reason", list(FinishReason))
@pytest.mark.parametrize("n", [1, 3])
async def test_response_types_of_whole_answers_conform(n, reason):
    """Chat and completion bodies, with one choice or several."""
    service = Service(FakeEngine(finish_reason=reason))
    chat = (await service.chat(n=n)).json()
    conform(chat, "CreateChatCompletionResponse")
    assert [choice["index"] for choice in chat["choices"]] == list(range(n))
    text = (await service.complete(n=n)).json()
    conform(text, "CreateCompletionResponse")
    assert {choice["finish_reason"] for choice in text["choices"]} == {reason}
    assert text["choices"][0]["logprobs"] is None
    assert chat["choices"][0]["logprobs"] is None
    assert chat["choices"][0]["message"]["refusal"] is None
    assert chat["model"] == text["model"] == MODEL


@pytest.mark.parametrize(
    "options", [None, {"include_usage": True}, {"continuous_usage_stats": True}]
)
async def test_response_types_of_stream_chunks_conform(options):
    """Every event of both endpoints, with and without usage."""
    service = Service()
    chat = events(await service.chat(stream=True, stream_options=options))
    text = events(await service.complete(stream=True, stream_options=options))
    assert chat.pop() == text.pop() == "[DONE]"
    assert len(chat) >= 3
    for chunk in chat:
        conform(chunk, "CreateChatCompletionStreamResponse")
    for chunk in text:
        conform(chunk, "CreateCompletionStreamResponse")


async def test_response_types_of_models_and_errors_conform():
    """The list, one model, and an error of each endpoint."""
    service = Service(max_context_tokens=4096)
    conform((await service.request("GET", "/v1/models")).json(), "ListModelsResponse")
    conform((await service.request("GET", f"/v1/models/{MODEL}")).json(), "Model")
    for path in (CHAT, COMPLETIONS):
        conform((await service.post(path, {})).json(), "ErrorResponse")
    conform((await service.request("GET", "/nowhere")).json(), "ErrorResponse")


def test_conform_can_say_no():
    """A body without what the specification requires does not pass."""
    with pytest.raises(ValidationError):
        conform({"id": "x", "object": "chat.completion"}, "CreateChatCompletionResponse")
    with pytest.raises(ValidationError):
        conform({"error": {"message": "x"}}, "ErrorResponse")
