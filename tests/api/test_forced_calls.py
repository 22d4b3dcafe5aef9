"""A call that had to be made and was cut by the limit: its syntax is nobody's text."""

import pytest

from serve_app.protocol import FinishReason
from tests.api.harness import Service, events
from tests.fakes import FakeEngine, Pause

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
NAMED = {"type": "function", "function": {"name": "weather"}}
CUT = [
    (['[{"name": "wea'], []),
    (['[{"name":"weather","parameters":'], []),
    (['[{"name": "weather", "parameters": {"city": "B'], ['{"city": "B']),
    (
        ['[{"name": "weather", "parameters": {}}', Pause(0.005), ', {"name":"weather","para'],
        ["{}"],
    ),
]


@pytest.mark.parametrize(("script", "arguments"), CUT)
@pytest.mark.parametrize("choice", ["required", NAMED])
async def test_forced_calls_show_no_syntax_when_cut(script, arguments, choice):
    """Complete or streamed; the finish says that the limit cut it."""
    service = Service(FakeEngine(script, finish_reason=FinishReason.LENGTH))
    fields = {"tools": TOOLS, "tool_choice": choice}
    (whole,) = (await service.chat(**fields)).json()["choices"]
    assert not whole["message"]["content"]
    calls = whole["message"].get("tool_calls", [])
    assert [call["function"]["arguments"] for call in calls] == arguments
    assert whole["finish_reason"] == "length"
    chunks = events(await service.chat(**fields, stream=True))[:-1]
    assert not any(chunk["choices"][0]["delta"].get("content") for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("script", "arguments"), CUT)
async def test_forced_calls_show_no_syntax_in_a_response_either(script, arguments):
    """It has the calls alone, or an empty message."""
    service = Service(FakeEngine(script, finish_reason=FinishReason.LENGTH))
    body = {
        "input": "hi",
        "tools": [{"type": "function", "name": "weather"}],
        "tool_choice": "required",
    }
    response = (await service.post("/v1/responses", body)).json()
    calls = [item for item in response["output"] if item["type"] == "function_call"]
    assert [call["arguments"] for call in calls] == arguments
    texts = [item["content"][0]["text"] for item in response["output"] if item not in calls]
    assert "".join(texts) == ""
    assert response["status"] == "incomplete"


async def test_forced_calls_leave_what_a_model_says_of_its_own_will():
    """Under `auto` text that looks like a cut call may be one, and is shown."""
    service = Service(FakeEngine(['{"name": "wea'], finish_reason=FinishReason.LENGTH))
    (choice,) = (await service.chat(tools=TOOLS)).json()["choices"]
    assert choice["message"]["content"] == '{"name": "wea'
