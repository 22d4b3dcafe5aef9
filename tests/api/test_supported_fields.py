"""Every known field is done, changes nothing, or is refused by name: exactly one."""

import pytest

from serve_app.api.schemas import ChatRequest, CompletionRequest
from serve_app.api.supported_fields import CHAT as CHAT_FIELDS
from serve_app.api.supported_fields import COMPLETION as COMPLETION_FIELDS
from serve_app.api.supported_fields import RESPONSES as RESPONSE_FIELDS
from serve_app.errors import InvalidRequest
from serve_app.protocol import MODEL_DEFAULTS, SamplingParams
from tests.api.harness import CHAT, COMPLETIONS, HELLO, Service, refusal
from tests.api.specification import request_fields

ENDPOINTS = [
    (CHAT_FIELDS, ChatRequest, request_fields("CreateChatCompletionRequest")),
    (COMPLETION_FIELDS, CompletionRequest, request_fields("CreateCompletionRequest")),
]
RESPONSES = "/v1/responses"
OLD = {"functions", "function_call"}  # are translated before the schema reads a body
SMALLEST = {CHAT: HELLO, COMPLETIONS: {"prompt": "Once"}, RESPONSES: {"input": "hi"}}
REFUSED = [
    *((CHAT, name, value) for name, value in CHAT_FIELDS.refused.items()),
    *((COMPLETIONS, name, value) for name, value in COMPLETION_FIELDS.refused.items()),
    *((RESPONSES, name, value) for name, value in RESPONSE_FIELDS.refused.items()),
]


@pytest.mark.parametrize(
    ("fields", "specified"),
    [
        *((fields, specified) for fields, _, specified in ENDPOINTS),
        (RESPONSE_FIELDS, request_fields("CreateResponse")),
    ],
)
def test_fields_are_each_in_exactly_one_table(fields, specified):
    """Nothing of the specification is overlooked, nothing stands twice."""
    assert len(specified) >= 17
    for name in specified:
        places = [name in fields.done, name in fields.hints, name in fields.refused]
        assert places.count(True) == 1, name


@pytest.mark.parametrize(("fields", "schema", "specified"), ENDPOINTS)
def test_fields_that_are_done_are_read_by_the_schema(fields, schema, specified):
    """A field that is called done is really read, and the other way round."""
    assert set(schema.model_fields) <= fields.done
    assert fields.done - set(schema.model_fields) <= OLD


@pytest.mark.parametrize(("path", "name", "neutral"), REFUSED)
async def test_fields_refused_are_named(path, name, neutral):
    """Any other value than the neutral ones is a 400 that names the field."""
    error = refusal(await Service().post(path, SMALLEST[path] | {name: "something"}), 400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert name in error["message"]


@pytest.mark.parametrize(("path", "name", "neutral"), REFUSED)
async def test_fields_refused_pass_at_their_neutral_values(path, name, neutral):
    """Clients send defaults explicitly; null is always neutral."""
    for value in (None, *neutral):
        response = await Service().post(path, SMALLEST[path] | {name: value})
        assert response.status_code == 200, value


@pytest.mark.parametrize("path", list(SMALLEST))
async def test_fields_unknown_are_ignored(path):
    """Load tools send extras; they change nothing."""
    service = Service()
    response = await service.post(path, SMALLEST[path] | {"x_tool": {"deep": [1]}, "": 0})
    assert response.status_code == 200
    assert len(service.engine.requests) == 1


def test_fields_check_distinguishes_what_changes_nothing():
    """Hints and unknown names, sorted; what is done or refused at a neutral value is neither."""
    body = {"zebra": 1, "user": "u", "tools": [], "messages": [], "apple": 2, "suffix": ""}
    assert CHAT_FIELDS.check(body) == ["apple", "user", "zebra"]


def test_fields_check_bounds_their_number():
    """Far over what any API has; a load tool's extras pass."""
    CHAT_FIELDS.check({f"x{n}": 1 for n in range(1024)})
    with pytest.raises(InvalidRequest, match="1024 fields"):
        CHAT_FIELDS.check({f"x{n}": 1 for n in range(1025)})


HINTS: dict[str, dict[str, list[object]]] = {
    CHAT: {
        "reasoning_effort": ["none", "low", "xhigh", "whatever"],
        "verbosity": ["low", "high"],
        "store": [True],
        "service_tier": ["flex", "priority"],
        "stream_options": [{"include_usage": True}, {"include_obfuscation": True}],
        "prediction": [{"type": "content", "content": "x"}],
        "cache_prompt": [True, False],
        "priority": [3],
    },
    RESPONSES: {
        "reasoning": [{"effort": None, "summary": None}, {"effort": "high", "summary": "auto"}],
        "include": [["reasoning.encrypted_content"], ["file_search_call.results"]],
        "text": [{"verbosity": "low"}],
        "store": [True, False],
        "service_tier": ["flex"],
        "truncation": ["auto"],
        "max_tool_calls": [3],
    },
}


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        (path, name, value)
        for path, hints in HINTS.items()
        for name, values in hints.items()
        for value in values
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_fields_that_are_hints_are_no_error(path, name, value, stream):
    """What cannot change the answer is taken; so nobody has to be asked to leave it out."""
    service = Service()
    response = await service.post(path, SMALLEST[path] | {name: value, "stream": stream})
    assert response.status_code == 200
    (request,) = service.engine.requests
    assert request.sampling == SamplingParams(
        max_tokens=request.sampling.max_tokens, unset=frozenset(MODEL_DEFAULTS)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 5),
        ("max_completion_tokens", 5),
        ("n_predict", 5),
        ("messages", HELLO["messages"]),
        ("response_format", {"type": "json_object"}),
        ("functions", [{"name": "f"}]),
        ("n", 2),
        ("logprobs", True),
        ("previous_response_id", "resp_1"),
    ],
)
async def test_fields_of_responses_that_are_called_otherwise_are_refused(name, value):
    """OpenAI refuses unknown names there; an answer of another length would surprise."""
    body = SMALLEST[RESPONSES] | {name: value}
    error = refusal(await Service().post(RESPONSES, body), 400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
