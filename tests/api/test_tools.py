"""Tools are checked, shown to the model, and enforced where the client asks for it."""

import pytest
from jsonschema import Draft202012Validator

from serve_app.api.schemas import ChatRequest, validate
from serve_app.api.tools import NamedFunction, Tool, calls_schema
from serve_app.errors import InvalidRequest, UnsupportedParameter

HELLO = {"messages": [{"role": "user", "content": "hi"}]}
CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}, "next": {"$ref": "#"}},
    "required": ["city"],
    "$defs": {"City": {"type": "string"}},
}


def tool(name="weather", **fields):
    return {"type": "function", "function": {"name": name} | fields}


def named(name):
    return {"type": "function", "function": {"name": name}}


def schema(*tools, **options):
    parsed = [Tool.model_validate(one) for one in tools]
    return Draft202012Validator(calls_schema(parsed, **({"parallel": True} | options)))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"tools": [{}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("a" * 257)]}, "tools[0].function.name"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool('a"b')]}, "tools[0].function.name"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [tool(), tool()]}, "tools"),
        ({"tools": [tool(str(n)) for n in range(129)]}, "tools"),
        ({"tools": [tool()], "tool_choice": "often"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": named("other")}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": named(None)}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": named("weather")}, "tool_choice"),
        ({"tools": [tool()], "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ],
)
def test_tools_that_are_wrong_are_refused_by_place(fields, param):
    """`param` is the path of the first fault."""
    with pytest.raises(InvalidRequest) as caught:
        validate(ChatRequest, HELLO | fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": [tool()], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": {"type": "custom"}}, "tool_choice"),
    ],
)
def test_tools_of_other_kinds_are_unsupported(fields, param):
    """Functions only."""
    with pytest.raises(UnsupportedParameter) as caught:
        validate(ChatRequest, HELLO | fields)
    assert caught.value.param == param


@pytest.mark.parametrize("choice", [None, "none", "auto", "required"])
def test_tools_choices_by_word(choice):
    """All of OpenAI's words."""
    body = validate(ChatRequest, HELLO | {"tools": [tool()], "tool_choice": choice})
    assert body.tool_choice == choice


@pytest.mark.parametrize("name", ["files.read", "mcp__github/list-issues", "ns:call", "a" * 65])
def test_tools_may_have_a_name_that_only_openai_refuses(name):
    """Tools of MCP servers and other providers have dots, slashes and long names."""
    body = validate(ChatRequest, HELLO | {"tools": [tool(name)], "tool_choice": named(name)})
    assert body.tools[0].shown()["function"]["name"] == name


def test_tools_choice_by_name():
    """A named function has to be among the tools."""
    body = validate(ChatRequest, HELLO | {"tools": [tool()], "tool_choice": named("weather")})
    assert body.tool_choice == NamedFunction("weather")


def test_tools_are_shown_without_what_only_the_server_reads():
    """Name, description and parameters, in that order, and none of them missing."""
    full = tool(description="d", parameters=CITY, strict=True)
    assert Tool.model_validate(full).shown() == tool(description="d", parameters=CITY)
    empty = tool(description="", parameters={"type": "object", "properties": {}})
    assert Tool.model_validate(tool()).shown() == empty
    assert Tool.model_validate(tool(parameters={"type": "object"})).shown() == empty


def call(name="weather", **parameters):
    return {"name": name, "parameters": parameters}


def test_schema_of_calls_takes_lists_of_right_calls_alone():
    """Known names, arguments after each function's own schema, whose references still lead home."""
    calls = schema(tool(parameters=CITY), tool("search"))
    good = [call(city="Bern", next={"city": "Ulm"}), call("search", q=1)]
    assert calls.is_valid(good)
    assert calls.is_valid(good[:1])
    for bad in (
        [],
        good[0],
        [call(city=1)],
        [call()],
        [call(city="Bern", next={"city": 1})],
        [call("other")],
        [{"name": "search"}],
        [call("search") | {"more": 1}],
    ):
        assert not calls.is_valid(bad), bad


def test_schema_without_parallel_calls_is_one_call():
    """One object, no list."""
    calls = schema(tool(), parallel=False)
    assert calls.is_valid(call())
    assert not calls.is_valid([call()])


def test_schema_with_an_answer_instead_of_a_call():
    """A schema for the answer, with references of its own, is the alternative."""
    either = schema(tool(), answer=CITY)
    assert either.is_valid([call()])
    assert either.is_valid({"city": "Bern", "next": {"city": "Ulm"}})
    assert not either.is_valid({"city": 1})
