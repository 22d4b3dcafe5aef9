"""A conversation's messages reach the chat template as templates read them."""

import pytest

from serve_app.api.messages import Message, shown
from serve_app.api.schemas import ChatRequest, validate
from serve_app.errors import InvalidRequest, UnsupportedParameter


def show(**fields):
    return Message.model_validate(fields).shown()


def asked(arguments, **fields):
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call | fields]}


@pytest.mark.parametrize(
    ("arguments", "read"),
    [('{"a": [1]}', {"a": [1]}), ("", {}), ("{}", {}), ("{oops", "{oops"), ("[1]", "[1]")],
)
def test_arguments_of_earlier_calls_are_objects_if_they_can_be(arguments, read):
    """Templates print them as JSON; what is no object stays the text it was."""
    message = show(**asked(arguments))
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": read}}
        ],
    }


def test_a_tools_answer_keeps_its_id():
    """The template can tell which call it answers."""
    assert show(role="tool", content="42", tool_call_id="c1") == {
        "role": "tool",
        "content": "42",
        "tool_call_id": "c1",
    }


def test_a_tools_answer_names_its_function():
    """Some templates print the name, and the client only has to send the call's id."""
    answer = {"role": "tool", "content": "42", "tool_call_id": "c1"}
    messages = [asked("{}"), answer, answer | {"name": "g"}, answer | {"tool_call_id": "c2"}]
    conversation = shown([Message.model_validate(message) for message in messages])
    assert [message.get("name") for message in conversation] == [None, "f", "g", None]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (asked("{}") | {"role": "user"}, "messages[0]"),
        ({"role": "assistant", "tool_calls": []}, "messages[0]"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0].id"),
        (asked({"a": 1}), "messages[0].tool_calls[0].function.arguments"),
        (asked("{}", function={"name": "f"}), "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_calls_that_are_none_are_refused_by_place(message, param):
    """Only an assistant calls, and its calls are complete."""
    with pytest.raises(InvalidRequest) as caught:
        validate(ChatRequest, {"messages": [message]})
    assert caught.value.param == param


def test_calls_of_custom_tools_are_unsupported():
    """Their input is no JSON, and no template here shows it."""
    with pytest.raises(UnsupportedParameter) as caught:
        validate(ChatRequest, {"messages": [asked("{}", type="custom")]})
    assert caught.value.param == "messages[0].tool_calls[0].type"
