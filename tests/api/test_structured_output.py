"""What a client may ask the text to look like, in every field that says it."""

import json

import pytest

from serve_app.api.convert import plan_chat, plan_completion
from serve_app.api.schemas import ChatRequest, CompletionRequest, validate
from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.protocol import Structure
from tests.api.harness import CHAT, COMPLETIONS, HELLO, Service, refusal
from tests.fakes import FakeEngine

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
ONCE = {"prompt": "Once"}
TOOL = {"type": "function", "function": {"name": "f"}}


def structures(**fields):
    return validate(ChatRequest, HELLO | fields).structures()


@pytest.mark.parametrize(
    ("field", "value", "structure"),
    [
        ("response_format", {"type": "json_object"}, Structure("json_object")),
        ("response_format", FORMAT, Structure("json_schema", json.dumps(SCHEMA))),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {"name": "any", "strict": True}},
            Structure("json_object"),
        ),
        *(
            ("response_format", form, Structure("json_schema", json.dumps(SCHEMA)))
            for form in (
                {"type": "json_object", "schema": SCHEMA},
                {"type": "json_schema", "schema": SCHEMA},
                {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
                {
                    "type": "json_schema",
                    "json_schema": {"name": "My Schema[int]", "schema": SCHEMA},
                },
                {"type": "json_schema", "json_schema": {"name": "", "schema": SCHEMA}},
                {"type": "json_schema", "json_schema": SCHEMA},
                {"type": "json_schema", "json_schema": json.dumps({"schema": SCHEMA})},
                {"type": "json_object", "json_schema": {"name": "a", "schema": SCHEMA}},
                {"type": "json", "value": SCHEMA},
                {"type": "json", "value": json.dumps(SCHEMA)},
                {"type": "json_schema", "value": {"name": "a", "schema": SCHEMA}},
            )
        ),
        ("response_format", {"type": "json_object", "schema": {}}, Structure("json_object")),
        ("response_format", {"type": "json_object", "schema": None}, Structure("json_object")),
        ("response_format", {"type": "json", "value": {}}, Structure("json_object")),
        ("response_format", {"type": "json_schema", "schema": {}}, Structure("json_schema", "{}")),
        ("response_format", {"type": "regex", "value": "a+"}, Structure("regex", "a+")),
        ("json_schema", SCHEMA, Structure("json_schema", json.dumps(SCHEMA))),
        ("regex", "a+", Structure("regex", "a+")),
        ("guided_json", SCHEMA, Structure("json_schema", json.dumps(SCHEMA))),
        ("guided_json", json.dumps(SCHEMA), Structure("json_schema", json.dumps(SCHEMA))),
        ("guided_regex", "a+", Structure("regex", "a+")),
        ("guided_choice", ["yes", "no"], Structure("choice", '["yes", "no"]')),
        ("guided_grammar", 'start: "a"', Structure("grammar", 'start: "a"')),
        ("structured_outputs", {"json": SCHEMA}, Structure("json_schema", json.dumps(SCHEMA))),
        ("structured_outputs", {"regex": "a+", "json": None}, Structure("regex", "a+")),
        ("structured_outputs", {"choice": ["a"]}, Structure("choice", '["a"]')),
        ("structured_outputs", {"grammar": "g"}, Structure("grammar", "g")),
        ("structured_outputs", {"json_object": True}, Structure("json_object")),
    ],
)
def test_structures_of_every_form(field, value, structure):
    """The order of a schema's properties is kept, because the text follows it."""
    assert structures(**{field: value}) == {field: structure}
    for plan in (
        plan_chat(validate(ChatRequest, HELLO | {field: value}), request_id="r"),
        plan_completion(validate(CompletionRequest, ONCE | {field: value}), request_id="r"),
    ):
        assert plan.requests[0].sampling.structure == structure
        assert plan.structure_field == field


def test_structures_of_plain_text_are_none():
    """Nor does null."""
    assert structures(response_format={"type": "text"}) == {}
    assert structures(response_format=None, guided_json=None, structured_outputs=None) == {}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        (
            "response_format",
            [
                "json",
                {},
                {"type": "xml"},
                {"type": "json_schema"},
                {"type": "json_schema", "json_schema": {}},
                {"type": "json_schema", "json_schema": "{"},
                {"type": "json_schema", "json_schema": []},
                {"type": "json_schema", "json_schema": {"type": "json_schema"}},
                {"type": "json_schema", "schema": []},
                {"type": "json_object", "schema": "{"},
                {"type": "regex"},
                {"type": "json_schema", "json_schema": {"name": "a", "schema": []}},
                {"type": "json_schema", "json_schema": {"name": "a", "schema": "{"}},
            ],
        ),
        ("guided_json", [1, [], "{", "[]"]),
        ("guided_regex", [1, "", ["a"]]),
        ("guided_choice", ["a", [], [1]]),
        ("json_schema", [1, []]),
        ("regex", [1, ""]),
        ("guided_grammar", [1, ""]),
        ("structured_outputs", [1, {}, {"json": SCHEMA, "regex": "a"}, {"choice": "a"}]),
    ],
)
def test_structures_of_no_form_are_refused_by_name(field, values):
    """Before the engine is asked."""
    for value in values:
        for schema, body in ((ChatRequest, HELLO), (CompletionRequest, {"prompt": "a"})):
            if field not in schema.model_fields:
                continue
            with pytest.raises(InvalidRequest) as caught:
                validate(schema, body | {field: value})
            assert caught.value.param == field, value


def test_structures_of_other_forms_are_unsupported():
    """Other servers know more of them."""
    with pytest.raises(UnsupportedParameter) as caught:
        structures(structured_outputs={"structural_tag": "{}"})
    assert caught.value.param == "structured_outputs"


def test_structures_of_two_forms_are_refused():
    """Which of two would win is nothing to guess."""
    with pytest.raises(InvalidRequest, match="guided_regex") as caught:
        structures(guided_regex="a", response_format={"type": "json_object"})
    assert caught.value.param == "guided_regex"


@pytest.mark.parametrize(
    ("path", "smallest", "fields", "param"),
    [
        (CHAT, HELLO, {"response_format": FORMAT}, "response_format"),
        (CHAT, HELLO, {"tools": [TOOL], "tool_choice": "required"}, "tools"),
        (COMPLETIONS, {"prompt": "a"}, {"guided_regex": "("}, "guided_regex"),
    ],
)
async def test_structures_that_the_engine_cannot_enforce_name_the_clients_field(
    path, smallest, fields, param
):
    """The engine compiles the structure; the client never heard of a field of that name."""
    engine = FakeEngine([InvalidRequest("it does not compile", param="structure")])
    error = refusal(await Service(engine).post(path, smallest | fields), 400)
    assert (error["param"], error["message"]) == (param, "it does not compile")


def planned(**fields):
    return plan_chat(validate(ChatRequest, HELLO | {"tools": [TOOL]} | fields), request_id="r")


def test_planned_tools_alone_leave_the_text_free():
    """The model calls in its own form; the reader looks for it."""
    plan = planned()
    assert plan.requests[0].sampling.structure is None
    assert list(plan.calls.parameters) == ["f"]
    assert plan.requests[0].prompt.tools[0]["function"]["name"] == "f"


def test_planned_without_calls_shows_no_tools():
    """Then the model is not even shown the tools."""
    plan = planned(tool_choice="none", response_format=FORMAT)
    assert plan.calls is None
    assert plan.requests[0].prompt.tools == ()
    assert plan.requests[0].sampling.structure == Structure("json_schema", json.dumps(SCHEMA))


@pytest.mark.parametrize(
    ("fields", "forms"),
    [
        ({"tool_choice": "required"}, ["array"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, ["call"]),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, ["call"]),
        ({"tool_choice": "required", "response_format": FORMAT}, ["array"]),
        ({"response_format": FORMAT}, ["array", "answer"]),
        ({"response_format": {"type": "json_object"}, "tool_choice": "auto"}, ["array", "answer"]),
    ],
)
def test_planned_calls_are_enforced_with_the_answers_form_beside_them(fields, forms):
    """A required call leaves no answer; under auto the answer keeps its schema."""
    structure = planned(**fields).requests[0].sampling.structure
    assert structure.kind == "json_schema"
    kinds = [
        "array" if form.get("type") == "array" else "answer" if "$ref" in form else "call"
        for form in json.loads(structure.definition)["anyOf"]
    ]
    assert kinds == forms


def test_planned_named_function_is_the_only_one_that_can_be_called():
    """Others are shown, not offered."""
    other = {"type": "function", "function": {"name": "g"}}
    choice = {"type": "function", "function": {"name": "g"}}
    plan = planned(tools=[TOOL, other], tool_choice=choice)
    assert list(json.loads(plan.requests[0].sampling.structure.definition)["$defs"]) == ["g"]
    assert len(plan.requests[0].prompt.tools) == 2


def test_planned_expression_cannot_stand_beside_tools():
    """Calls are JSON; a regular expression cannot allow for them."""
    with pytest.raises(InvalidRequest) as caught:
        planned(guided_regex="a+")
    assert caught.value.param == "guided_regex"
