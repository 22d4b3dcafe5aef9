"""Probabilities in both of OpenAI's forms, also for characters that are cut between tokens."""

import pytest

from serve_app.api.logprobs import CompletionTokens, chat_logprobs
from serve_app.protocol import Logprob, TokenLogprobs
from tests.api.harness import Service, events, refusal
from tests.api.specification import conform
from tests.fakes import FakeEngine, Pause


def token(text, logprob=-0.5, top=(), raw=None):
    chosen = Logprob(1, text, text.encode() if raw is None else raw, logprob)
    return TokenLogprobs(chosen, top)


HALVES = [token("\ufffd", raw=b"\xc3"), token("\ufffd", raw=b"\xa9"), token("!")]


def test_chat_logprobs_bytes_join_to_characters():
    """Each token has its bytes, though half a character has no text."""
    content = chat_logprobs(HALVES)["content"]
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == "é!"
    assert [one["token"] for one in content] == ["\ufffd", "\ufffd", "!"]


def test_completion_tokens_offsets_count_characters():
    """Offsets point into the text; half characters have names of their own."""
    body = CompletionTokens().read(HALVES)
    assert body["tokens"] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert body["text_offset"] == [0, 0, 1]


def test_completion_tokens_offsets_go_on_from_chunk_to_chunk():
    """A stream's chunks say what the whole would."""
    tokens = CompletionTokens()
    offsets = [tokens.read([one])["text_offset"][0] for one in [*HALVES, token("x")]]
    assert offsets == [0, 0, 1, 2]


def test_completion_tokens_put_special_tokens_before_the_text_at_its_beginning():
    """A begin-of-text token is none of the client's characters."""
    body = CompletionTokens(-5).read([TokenLogprobs(None), token("Hi"), token("!")], first="<bos>")
    assert body == {
        "tokens": ["<bos>", "Hi", "!"],
        "token_logprobs": [None, -0.5, -0.5],
        "top_logprobs": [None, {"Hi": -0.5}, {"!": -0.5}],
        "text_offset": [0, 0, 2],
    }


def test_completion_tokens_have_the_chosen_one_among_the_alternatives():
    """Load tools compare it with the best of them."""
    best, second = Logprob(2, "a", b"a", -0.1), Logprob(3, "b", b"b", -2.0)
    chosen = Logprob(4, "c", b"c", -3.0)
    (top,) = CompletionTokens().read([TokenLogprobs(chosen, (best, second))])["top_logprobs"]
    assert top == {"a": -0.1, "b": -2.0, "c": -3.0}


@pytest.mark.parametrize("top", [None, 0, 3])
async def test_logprobs_are_shown_in_a_chat(top):
    """Every token with as many alternatives as were asked for; `refusal` is null."""
    service = Service(FakeEngine(["a", "b"]))
    body = (await service.chat(logprobs=True, top_logprobs=top)).json()
    conform(body, "CreateChatCompletionResponse")
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert [one["token"] for one in logprobs["content"]] == ["a", "b"]
    assert [len(one["top_logprobs"]) for one in logprobs["content"]] == [top or 0] * 2
    assert service.engine.requests[0].sampling.logprobs == (top or 0)


@pytest.mark.parametrize("fields", [{}, {"logprobs": False}, {"logprobs": None}])
async def test_logprobs_are_null_when_nobody_asked(fields):
    """Null in both endpoints, and the engine computes none."""
    service = Service()
    assert (await service.chat(**fields)).json()["choices"][0]["logprobs"] is None
    assert (await service.complete()).json()["choices"][0]["logprobs"] is None
    assert {request.sampling.logprobs for request in service.engine.requests} == {None}


async def test_logprobs_are_needed_for_alternatives():
    """As OpenAI: `top_logprobs` alone is a mistake worth an error."""
    for fields in ({"top_logprobs": 2}, {"top_logprobs": 2, "logprobs": False}):
        assert refusal(await Service().chat(**fields), 400)["param"] == "top_logprobs"
    assert (await Service().chat(top_logprobs=0)).status_code == 200


async def test_logprobs_of_a_stream_add_up_to_the_wholes():
    """Each token once, in order, in chat and completions."""
    engine = FakeEngine(["a", Pause(0.002), "", "b", Pause(0.002), "c"])
    service = Service(engine)
    asked = {"logprobs": True, "top_logprobs": 2}
    whole = (await service.chat(**asked)).json()["choices"][0]["logprobs"]["content"]
    chunks = events(await service.chat(stream=True, **asked))[:-1]
    for chunk in chunks:
        conform(chunk, "CreateChatCompletionStreamResponse")
    reported = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [one for logprobs in reported if logprobs for one in logprobs["content"]] == whole
    assert len(whole) == 4

    whole = (await service.complete(logprobs=2)).json()["choices"][0]["logprobs"]
    chunks = events(await service.complete(logprobs=2, stream=True))[:-1]
    reported = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name, items in whole.items():
        assert [item for logprobs in reported if logprobs for item in logprobs[name]] == items
        assert len(items) == 4
