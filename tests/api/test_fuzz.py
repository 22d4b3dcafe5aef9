"""Whatever is posted, the answer is a valid answer or an envelope, and never a 5xx."""

import asyncio
import gc
import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st

from serve_app.api.supported_fields import CHAT as CHAT_FIELDS
from serve_app.api.supported_fields import COMPLETION as COMPLETION_FIELDS
from serve_app.api.supported_fields import RESPONSES as RESPONSES_FIELDS
from tests.api.harness import CHAT, COMPLETIONS, Service, refusal
from tests.api.specification import conform
from tests.fakes import FakeEngine

pytestmark = pytest.mark.slow

# Over 5,000 requests in all: seven tests of 700, and 250 that are sent ten times.
SETTINGS = settings(max_examples=700, deadline=None, suppress_health_check=list(HealthCheck))
HANGS_S = 5
FLAT_BYTES = 32_768  # after 750 requests: not one small object of each stays

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**30, 1e308, "", "\x00", "\ud800", "💥"])
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
contents = st.text(max_size=20) | st.lists(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"]), "text": st.text()})
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "developer", "user", "assistant", "user", "user"]),
            "content": contents,
        },
        optional={"name": st.text(max_size=5), "tool_call_id": st.text(max_size=5)},
    ),
    min_size=1,
    max_size=3,
)
prompts = st.text(max_size=20) | st.lists(st.text(max_size=5)) | st.lists(st.integers())
items = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["function_call", "function_call_output", "item_reference"])},
        optional={
            "call_id": st.text(max_size=5),
            "name": st.just("a"),
            "arguments": st.sampled_from(["{}", "{", "5"]),
            "output": contents,
        },
    ),
    min_size=1,
    max_size=3,
)
SENSIBLE = {
    "stream": st.booleans(),
    "n": st.integers(1, 4),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "max_tokens": st.integers(1, 99),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logit_bias": st.dictionaries(st.integers(0, 99).map(str), st.floats(-100, 100), max_size=3),
    "presence_penalty": st.floats(-2, 2),
    "echo": st.booleans(),
    "logprobs": st.booleans() | st.integers(0, 5),
    "top_logprobs": st.integers(0, 20),
    "tools": st.just([{"type": "function", "function": {"name": "a"}}]),
    "tool_choice": st.sampled_from(["none", "auto", "required"]),
    "response_format": st.just({"type": "json_object"}),
    "guided_choice": st.just(["a"]),
    "stop": st.lists(st.text(max_size=3), max_size=5) | st.text(max_size=3),
}

TOKENS = ({"count", "max_model_len", "tokens", "token_strs"}, {"prompt"})
RESPONSES = "/v1/responses"
ANSWERS = {
    CHAT: "CreateChatCompletionResponse",
    COMPLETIONS: "CreateCompletionResponse",
    RESPONSES: "Response",
}
TOKEN_FIELDS = {
    "prompt": prompts,
    "messages": messages,
    "tokens": st.lists(st.integers(0, 99)),
    "add_special_tokens": st.booleans(),
    "return_token_strs": st.booleans(),
}
# What a JSON reader may stumble over, wherever it stands.
STUMBLING = [b"1e999", b"-1e-999", b"9" * 5_000, b"\xed\xa0\x80", b"\xff", b"\x00", b'"n":3,']


@st.composite
def bodies(draw, name, right, fields):
    """Bodies that are often nearly right: up to three fields more, sensible or not."""
    body = {name: draw(anything if draw(st.integers(0, 3)) == 0 else right)}
    names = sorted(set(fields.rules) - {"model", name})
    for extra in draw(st.lists(st.sampled_from(names), max_size=3)):
        neutral = [None, *fields.refused.get(extra, ())]
        usual = SENSIBLE.get(extra, st.sampled_from(neutral))
        body[extra] = draw(anything if draw(st.integers(0, 3)) == 0 else usual)
    return body


async def send(service, path, body, **headers):
    async with asyncio.timeout(HANGS_S):
        return await service.post_raw(path, body, **headers)


def post(path, body, **headers):
    service = Service(FakeEngine(["a", "b"]), max_request_bytes=65_536)
    response = asyncio.run(send(service, path, body, **headers))
    assert not service.engine.running
    assert len(service.records) == 1
    return response


def check(response, path):
    """A good answer is valid against the specification, any other is an envelope of a 4xx."""
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, response.text
        assert refusal(response, response.status_code)["message"]
    elif response.headers["content-type"].startswith("text/event-stream"):
        last = response.text.split("\n\n")[-2]
        assert last.startswith(("data: [DONE]", "event: response.completed")), last
    elif path in ANSWERS:
        conform(response.json(), ANSWERS[path])
    else:
        assert set(response.json()) in TOKENS
    return response.status_code


@SETTINGS
@given(bodies("messages", messages, CHAT_FIELDS))
def test_fuzz_chat_bodies(body):
    """Well-formed JSON of any meaning, to the chat endpoint."""
    event(str(check(post(CHAT, json.dumps(body).encode()), CHAT)))


@SETTINGS
@given(bodies("prompt", prompts, COMPLETION_FIELDS))
def test_fuzz_completion_bodies(body):
    """Well-formed JSON of any meaning, to the completions endpoint."""
    event(str(check(post(COMPLETIONS, json.dumps(body).encode()), COMPLETIONS)))


@SETTINGS
@given(bodies("input", st.text(max_size=20) | messages | items, RESPONSES_FIELDS))
def test_fuzz_response_bodies(body):
    """Well-formed JSON of any meaning, to the responses endpoint."""
    event(str(check(post(RESPONSES, json.dumps(body).encode()), RESPONSES)))


@SETTINGS
@given(
    st.fixed_dictionaries({}, optional={k: v | anything for k, v in TOKEN_FIELDS.items()}),
    st.sampled_from(["/tokenize", "/detokenize"]),
)
def test_fuzz_token_bodies(body, path):
    """Well-formed JSON of any meaning, to the endpoints beside generation."""
    event(str(check(post(path, json.dumps(body).encode()), path)))


@SETTINGS
@given(st.binary(max_size=200), st.sampled_from([CHAT, COMPLETIONS, "/tokenize", "/detokenize"]))
def test_fuzz_any_bytes(body, path):
    """Not even JSON."""
    assert check(post(path, body), path) == 400


@SETTINGS
@given(st.data())
def test_fuzz_damaged_json(data):
    """A right body with some bytes changed, cut or repeated, or with what is hard to read."""
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}], "n": 2}).encode()
    start = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(start, len(body)))
    piece = data.draw(st.binary(max_size=8) | st.sampled_from(STUMBLING))
    check(post(CHAT, body[:start] + piece + body[end:]), CHAT)


@SETTINGS
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "x-request-id",
                "x-request-timeout-seconds",
                "content-length",
                "content-type",
                "origin",
            ]
        ),
        st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=255), max_size=40),
    )
)
def test_fuzz_any_headers(headers):
    """Headers of any content."""
    body = b'{"prompt": "Once"}'
    encoded = {name: value.encode("latin-1") for name, value in headers.items()}
    check(post(COMPLETIONS, body, **encoded), COMPLETIONS)


def growth(service, shots, *, forget):
    """Return the bytes that stay allocated after the third to fifth round of the same requests."""

    async def rounds(count):
        for _ in range(count):
            for path, body in shots:
                await send(service, path, body)
            forget()
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    async def measure():
        await rounds(1)
        tracemalloc.start()
        try:
            return -await rounds(1) + await rounds(3)
        finally:
            tracemalloc.stop()

    return asyncio.run(measure())


def test_fuzz_leaves_memory_flat():
    """Requests of any kind leave nothing behind; the same measure sees it if records stay."""
    shots = []

    @settings(SETTINGS, max_examples=250, phases=[Phase.generate], derandomize=True, database=None)
    @given(bodies("messages", messages, CHAT_FIELDS) | bodies("prompt", prompts, COMPLETION_FIELDS))
    def draw(body):
        shots.append((CHAT if "messages" in body else COMPLETIONS, json.dumps(body).encode()))

    draw()
    service = Service(FakeEngine(["a", "b"]))

    def forget():
        service.records.clear()
        service.engine.requests.clear()

    assert growth(service, shots, forget=forget) < FLAT_BYTES
    assert growth(service, shots, forget=service.engine.requests.clear) > FLAT_BYTES


@pytest.mark.parametrize("depth", [10, 190, 250, 10_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_fuzz_deep_nesting(depth, opening, closing):
    """Deep values are taken or refused, at any depth, in any field."""
    value = opening * depth + "1" + closing * depth
    for name in ("messages", "chat_template_kwargs", "metadata", "tools", "stop", "zzz"):
        body = f'{{"messages": [{{"role": "user", "content": "a"}}], "{name}": {value}}}'
        check(post(CHAT, body.encode()), CHAT)


def test_fuzz_check_can_fail():
    """An answer with a 5xx does not pass as harmless."""
    service = Service(FakeEngine([RuntimeError("fault")]))
    response = asyncio.run(service.complete())
    with pytest.raises(AssertionError):
        check(response, COMPLETIONS)
