"""Every field of OpenAI's specification is honoured, a label, or refused: exactly one."""

import pytest

from serve_app.api.fields import CHAT as CHAT_FIELDS
from serve_app.api.fields import COMPLETION as COMPLETION_FIELDS
from serve_app.api.fields import RESPONSES as RESPONSE_FIELDS
from serve_app.api.schemas import ChatRequest, CompletionRequest
from tests.api.harness import CHAT, COMPLETIONS, HELLO, Service, refusal
from tests.api.specification import request_fields

ENDPOINTS = [
    (CHAT_FIELDS, ChatRequest, request_fields("CreateChatCompletionRequest")),
    (COMPLETION_FIELDS, CompletionRequest, request_fields("CreateCompletionRequest")),
]
RESPONSES = "/v1/responses"
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
def test_each_specified_field_is_in_exactly_one_table(fields, specified):
    """Nothing of the specification is overlooked, nothing stands twice."""
    assert len(specified) >= 17
    for name in specified:
        places = [name in fields.honoured, name in fields.labels, name in fields.refused]
        assert places.count(True) == 1, name


@pytest.mark.parametrize(("fields", "schema", "specified"), ENDPOINTS)
def test_the_schema_reads_exactly_the_honoured_fields(fields, schema, specified):
    """A field that is called honoured is really read, and the other way round."""
    assert set(schema.model_fields) == fields.honoured


@pytest.mark.parametrize(("path", "name", "neutral"), REFUSED)
async def test_a_refused_field_names_itself(path, name, neutral):
    """Any other value than the neutral ones is a 400 that names the field."""
    error = refusal(await Service().post(path, SMALLEST[path] | {name: "something"}), 400)
    assert (error["code"], error["param"]) == ("unsupported_parameter", name)
    assert name in error["message"]


@pytest.mark.parametrize(("path", "name", "neutral"), REFUSED)
async def test_a_refused_field_passes_at_its_neutral_values(path, name, neutral):
    """Clients send defaults explicitly; null is always neutral."""
    for value in (None, *neutral):
        response = await Service().post(path, SMALLEST[path] | {name: value})
        assert response.status_code == 200, value


@pytest.mark.parametrize("path", list(SMALLEST))
async def test_unknown_fields_are_ignored(path):
    """Load tools send extras; they change nothing."""
    service = Service()
    response = await service.post(path, SMALLEST[path] | {"x_tool": {"deep": [1]}, "": 0})
    assert response.status_code == 200
    assert len(service.engine.requests) == 1


def test_unknown_names_are_told_apart():
    """Only what stands in no table is unknown."""
    body = {"zebra": 1, "user": "u", "tools": [], "messages": [], "apple": 2}
    assert CHAT_FIELDS.unknown(body) == ["apple", "zebra"]
