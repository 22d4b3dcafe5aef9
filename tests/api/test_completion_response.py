"""Completions: logprobs, and the prompt in front of them, as evaluation tools ask for it."""

import pytest

from tests.api.harness import Service, events, refusal
from tests.api.specification import conform
from tests.fakes import FakeEngine

IDS = [7, 8, 9]


def reported(chunks, name):
    """Return what a stream's chunks reported of the first choice, added up."""
    choices = [chunk["choices"][0] for chunk in chunks]
    if name == "text":
        return "".join(choice["text"] for choice in choices)
    return [item for choice in choices if choice["logprobs"] for item in choice["logprobs"][name]]


@pytest.mark.parametrize(("prompt", "text"), [("Once", "Once"), (IDS, "7 8 9")])
async def test_completion_response_shows_the_prompt_in_front(prompt, text):
    """As it was sent, or as the text of the ids that were sent; whole and streamed."""
    service = Service(FakeEngine([" upon", " a"]))
    body = (await service.complete(prompt=prompt, echo=True, n=2)).json()
    conform(body, "CreateCompletionResponse")
    assert [choice["text"] for choice in body["choices"]] == [f"{text} upon a"] * 2
    chunks = events(await service.complete(prompt=prompt, echo=True, stream=True))[:-1]
    assert reported(chunks, "text") == f"{text} upon a"


async def test_completion_response_shows_each_prompt_with_its_own_choices():
    """Prompt by prompt."""
    body = (await Service(FakeEngine(["!"])).complete(prompt=["a", "b"], n=2, echo=True)).json()
    assert [choice["text"] for choice in body["choices"]] == ["a!", "a!", "b!", "b!"]


@pytest.mark.parametrize("n", [1, 2])
async def test_completion_response_echoes_the_prompts_logprobs(n):
    """Every token of prompt and completion; the first one has none to have."""
    service = Service(FakeEngine([" x"]))
    body = (await service.complete(prompt=IDS, echo=True, logprobs=1, max_tokens=1, n=n)).json()
    for choice in body["choices"]:
        assert choice["text"] == "7 8 9 x"
        assert choice["logprobs"] == {
            "tokens": ["7", " 8", " 9", " x"],
            "token_logprobs": [None, -0.125, -0.125, -0.125],
            "top_logprobs": [None, {" 8": -0.125}, {" 9": -0.125}, {" x": -0.125}],
            "text_offset": [0, 1, 3, 5],
        }
    assert service.engine.requests[0].sampling.prompt_logprobs == 1


async def test_completion_response_scores_a_likelihood_as_evaluation_tools_do():
    """Context and continuation in ids, one token generated and cut off: what lm-eval reads."""
    context, continuation = [1, 2, 3], [4, 5]
    body = (
        await Service(FakeEngine([" end"])).complete(
            prompt=[context + continuation], echo=True, logprobs=1, max_tokens=1, temperature=0
        )
    ).json()
    logprobs = body["choices"][0]["logprobs"]
    scores = logprobs["token_logprobs"][len(context) : -1]
    tops = logprobs["top_logprobs"][len(context) : -1]
    tokens = logprobs["tokens"][len(context) : -1]
    assert len(scores) == len(continuation)
    assert sum(scores) == -0.25
    assert [max(top, key=top.get) for top in tops] == tokens


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_response_may_have_no_token(stream):
    """`max_tokens: 0` scores a prompt: nothing of a completion is shown or counted."""
    service = Service(FakeEngine([" never"]))
    response = await service.complete(
        prompt=IDS, echo=True, logprobs=0, max_tokens=0, stream=stream
    )
    chunks = events(response)[:-1] if stream else [response.json()]
    assert reported(chunks, "text") == "7 8 9"
    assert reported(chunks, "tokens") == ["7", " 8", " 9"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert service.engine.requests[0].sampling.max_tokens == 1
    assert service.records[0].completion_tokens == 0


async def test_completion_response_streams_an_echo_as_the_whole_has_it():
    """Text and lists add up."""
    service = Service(FakeEngine([" x", " y"]))
    asked = {"prompt": IDS, "echo": True, "logprobs": 2}
    choice = (await service.complete(**asked)).json()["choices"][0]
    chunks = events(await service.complete(**asked, stream=True))[:-1]
    assert reported(chunks, "text") == choice["text"]
    for name, items in choice["logprobs"].items():
        assert reported(chunks, name) == items


async def test_completion_response_streams_an_echo_with_logprobs_of_one_choice():
    """The prompt's probabilities come once, with the first choice."""
    error = refusal(await Service().complete(echo=True, logprobs=1, n=2, stream=True), 400)
    assert error["param"] == "n"


@pytest.mark.parametrize(("best_of", "n", "status"), [(1, None, 200), (2, 2, 200), (3, 2, 400)])
async def test_completion_response_takes_best_of_as_n_or_refuses_it(best_of, n, status):
    """Ranking more than is shown is not done here."""
    response = await Service().complete(best_of=best_of, n=n)
    assert response.status_code == status
    if status == 400:
        assert refusal(response, 400)["param"] == "best_of"


async def test_completion_response_reports_ids_where_they_are_asked_for():
    """Each choice has its prompt's and its own; in a stream the prompt's come once."""
    service = Service(FakeEngine(("a", "b")))
    body = (await service.complete(return_token_ids=True, prompt=["x", "y"])).json()
    for choice in body["choices"]:
        assert choice["prompt_token_ids"] == [0, 1, 2, 3, 4]
        assert choice["token_ids"] == [1, 2]
    chunks = events(await service.complete(return_token_ids=True, stream=True))[:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["prompt_token_ids"] == [0, 1, 2, 3, 4]
    assert sum("prompt_token_ids" in choice for choice in choices) == 1
    assert [token for choice in choices for token in choice.get("token_ids", [])] == [1, 2]


async def test_completion_response_shows_a_cut_prompt_as_it_was_read():
    """The echo is the text of the ids that are left."""
    service = Service(FakeEngine(("!",)))
    body = (await service.complete(echo=True, truncate_prompt_tokens=3, prompt="Once upon")).json()
    assert body["choices"][0]["text"] == "0 1 2 3 4!"
