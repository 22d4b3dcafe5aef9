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
def test_show_makes_arguments_of_earlier_calls_objects_if_they_can_be(arguments, read):
    """Templates print them as JSON; what is no object stays the text it was."""
    message = show(**asked(arguments))
    assert message == {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": read}}
        ],
    }


def test_show_keeps_the_id_of_a_tools_answer():
    """The template sees which call it answers."""
    assert show(role="tool", content="42", tool_call_id="c1") == {
        "role": "tool",
        "content": "42",
        "tool_call_id": "c1",
    }


def test_show_names_the_function_of_a_tools_answer():
    """Some templates print the name, and the client only has to send the call's id."""
    answer = {"role": "tool", "content": "42", "tool_call_id": "c1"}
    messages = [asked("{}"), answer, answer | {"name": "g"}, answer | {"tool_call_id": "c2"}]
    conversation = shown([Message.model_validate(message) for message in messages])
    assert [message.get("name") for message in conversation] == [None, "f", "g", None]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (asked("{}") | {"role": "user"}, "messages[0]"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
        (asked(1), "messages[0].tool_calls[0].function.arguments"),
        (asked("{}", function={}), "messages[0].tool_calls[0].function.name"),
        ({"role": "assistant", "content": [{"text": "a"}]}, "messages[0].content"),
        ({"role": "assistant", "content": 1}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0]"),
        ({"role": "system"}, "messages[0]"),
    ],
)
def test_messages_that_mean_nothing_are_refused_by_place(message, param):
    """Only an assistant calls, a call has a name, and what the user says is there."""
    with pytest.raises(InvalidRequest) as caught:
        validate(ChatRequest, {"messages": [message]})
    assert caught.value.param == param


def test_messages_of_custom_tools_are_unsupported():
    """Their input is no JSON, and no template here shows it."""
    with pytest.raises(UnsupportedParameter) as caught:
        validate(ChatRequest, {"messages": [asked("{}", type="custom")]})
    assert caught.value.param == "messages[0].tool_calls[0].type"


THINKING = {"type": "thinking", "thinking": "hm", "signature": "x"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, ""),
        ({"content": None}, ""),
        ({"content": []}, ""),
        ({"content": ""}, ""),
        ({"content": ["a", {"type": "text", "text": "b"}]}, "a\nb"),
        ({"content": [{"type": "output_text", "text": "a", "annotations": []}]}, "a"),
        ({"content": [THINKING]}, ""),
        ({"content": [THINKING, {"type": "text", "text": "a"}]}, "a"),
        ({"content": [{"type": "redacted_thinking", "data": "x"}]}, ""),
        ({"content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        ({"refusal": "no"}, "no"),
        ({"content": None, "refusal": "no"}, "no"),
        ({"content": "yes", "refusal": None}, "yes"),
    ],
)
def test_show_gives_the_content_of_an_earlier_answer_its_meaning(fields, text):
    """No content is an empty one, a refusal is its text, thoughts are left out."""
    for calls in ({}, {"tool_calls": []}, {"tool_calls": None}):
        assert show(role="assistant", **fields, **calls) == {"role": "assistant", "content": text}
    called = show(**(asked({}) | fields))
    assert called["content"] == text
    assert called["tool_calls"]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_show_hands_thoughts_of_an_earlier_answer_to_the_template(name):
    """Which shows them where its model wants to see them; what is no text is left out."""
    message = show(role="assistant", content="a", **{name: "hm"})
    assert message == {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert "reasoning_content" not in show(role="assistant", content="a", **{name: [{"x": 1}]})
    assert "reasoning_content" not in show(role="user", content="a", **{name: "hm"})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ([], ""),
        ("42", "42"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        (["a", "b"], "a\nb"),
        ({"temp": 20}, '{"temp": 20}'),
        ([{"temp": 20}, {"temp": 21}], '[{"temp": 20}, {"temp": 21}]'),
        (42, "42"),
        (True, "true"),
    ],
)
def test_show_gives_the_content_of_a_result_its_meaning(content, text):
    """A text, its parts, or the function's value as JSON."""
    assert show(role="tool", tool_call_id="c", content=content)["content"] == text


def test_messages_with_pictures_of_an_earlier_answer_are_unsupported():
    """They are not left out without a word."""
    for role in ("assistant", "tool"):
        picture = {"type": "image_url", "image_url": {"url": "x"}}
        with pytest.raises(UnsupportedParameter):
            validate(ChatRequest, {"messages": [{"role": role, "content": [picture]}]})


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_show_takes_arguments_as_an_object(arguments):
    """As it is, or as the text of one."""
    assert show(**asked(arguments))["tool_calls"][0]["function"]["arguments"] == {"a": 1}


@pytest.mark.parametrize(
    "function", [{"name": "f"}, {"name": "f", "arguments": None}, {"name": "f", "arguments": []}]
)
@pytest.mark.parametrize("fields", [{}, {"type": None}, {"id": None}])
def test_show_fills_in_what_a_call_does_not_say(function, fields):
    """No arguments are empty ones, and a call is one of a function."""
    (message,) = shown([Message.model_validate(asked("", function=function, **fields))])
    (call,) = message["tool_calls"]
    assert (call["type"], call["function"]) == ("function", {"name": "f", "arguments": {}})
    assert call["id"]


def conversation(*messages):
    return shown([Message.model_validate(message) for message in messages])


def calls(*names, ids=()):
    ids = [*ids, *[None] * len(names)]
    made = [{"id": id_, "function": {"name": name}} for name, id_ in zip(names, ids, strict=False)]
    return {"role": "assistant", "tool_calls": made}


def test_conversation_answers_calls_in_order_by_results_without_an_id():
    """Every call gets an id of nine letters and digits, every result that of its call."""
    result = {"role": "tool", "content": "1"}
    reported = conversation(calls("f", "g"), result, result, calls("h"), result)
    ids = [call["id"] for message in reported for call in message.get("tool_calls", [])]
    assert len(set(ids)) == 3
    assert all(len(id_) == 9 and id_.isalnum() for id_ in ids)
    answers = [(m["tool_call_id"], m["name"]) for m in reported if m["role"] == "tool"]
    assert answers == list(zip(ids, ["f", "g", "h"], strict=True))


def test_conversation_answers_by_name_the_call_of_a_result():
    """As far as the client gives one; ids that it gives stay and are not given again."""
    reported = conversation(
        calls("f", "g", ids=["call00001"]),
        {"role": "tool", "content": "1", "name": "g"},
        {"role": "tool", "content": "2"},
    )
    ids = [call["id"] for call in reported[0]["tool_calls"]]
    assert ids[0] == "call00001" != ids[1]
    assert [m["tool_call_id"] for m in reported[1:]] == [ids[1], ids[0]]


def test_conversation_keeps_the_id_of_a_result_of_no_call():
    """It is shown as it came; one without an id gets one."""
    reported = conversation({"role": "tool", "content": "1", "tool_call_id": "x"})
    assert reported[0] == {"role": "tool", "content": "1", "tool_call_id": "x"}
    assert conversation({"role": "tool", "content": "1"})[0]["tool_call_id"]
