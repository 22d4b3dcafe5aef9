"""Older and newer shapes of a chat's body: OpenAI's first form of tools, and allowed tools."""

import json

import pytest

from serve_app.api.shapes import modern
from serve_app.errors import InvalidRequest
from serve_app.protocol import FinishReason
from tests.api.harness import CHAT, HELLO, Service, events, refusal
from tests.api.specification import conform
from tests.fakes import FakeEngine, Pause

WEATHER = {
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TIME = {"name": "time"}
CALL = ['{"name": "weather", ', Pause(0.005), '"parameters": {"city": "Bern"}}']
OLD_CHAT = HELLO | {"functions": [WEATHER, TIME]}


async def test_shapes_answer_a_call_in_the_form_it_was_asked_for():
    """`function_call` with name and arguments, its own reason to finish, and no list of calls."""
    service = Service(FakeEngine(CALL))
    body = (await service.post(CHAT, OLD_CHAT)).json()
    conform(body, "CreateChatCompletionResponse")
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "function_call"
    assert "tool_calls" not in choice["message"]
    call = choice["message"]["function_call"]
    assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Bern"})
    request = service.engine.requests[0]
    assert [tool["function"]["name"] for tool in request.prompt.tools] == ["weather", "time"]


async def test_shapes_stream_a_call_that_adds_up_to_the_same():
    """The name with the first piece, then the arguments."""
    chunks = events(await Service(FakeEngine(CALL)).post(CHAT, OLD_CHAT | {"stream": True}))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    calls = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert calls[0]["name"] == "weather"
    assert json.loads("".join(call.get("arguments", "") for call in calls)) == {"city": "Bern"}
    assert chunks[-2]["choices"][0]["finish_reason"] == "function_call"
    assert not any("tool_calls" in delta for delta in deltas)
    for chunk in chunks[:-1]:
        conform(chunk, "CreateChatCompletionStreamResponse")


async def test_shapes_leave_text_and_a_cut_answer_as_they_are():
    """Only a call has the form of one."""
    for engine, reason in (
        (FakeEngine(["hi"]), "stop"),
        (FakeEngine(["hi"], finish_reason=FinishReason.LENGTH), "length"),
    ):
        (choice,) = (await Service(engine).post(CHAT, OLD_CHAT)).json()["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == ("hi", reason)
        assert "function_call" not in choice["message"]


@pytest.mark.parametrize(
    ("choice", "names", "kinds"),
    [
        ("none", [], None),
        ("auto", ["weather", "time"], None),
        (None, ["weather", "time"], None),
        ({"name": "time"}, ["weather", "time"], ["time"]),
    ],
)
async def test_shapes_take_the_old_choice_as_the_new_one(choice, names, kinds):
    """`none`, `auto` and a name; the latter is enforced."""
    service = Service()
    body = OLD_CHAT | {"function_call": choice}
    assert (await service.post(CHAT, body)).status_code == 200
    request = service.engine.requests[0]
    assert [tool["function"]["name"] for tool in request.prompt.tools] == names
    structure = request.sampling.structure
    if kinds is None:
        assert structure is None
    else:
        assert list(json.loads(structure.definition)["$defs"]) == kinds


async def test_shapes_read_a_history_of_the_first_form():
    """Also without functions to call: calls and results as the template knows them, paired."""
    history = [
        {"role": "user", "content": "weather and time?"},
        {
            "role": "assistant",
            "content": None,
            "function_call": {"name": "weather", "arguments": '{"city": "Bern"}'},
        },
        {"role": "function", "name": "weather", "content": "12 C"},
        {
            "role": "assistant",
            "content": "",
            "function_call": {"name": "time", "arguments": "{}"},
        },
        {"role": "function", "name": "time", "content": "noon"},
    ]
    for body in ({"messages": history}, OLD_CHAT | {"messages": history}):
        service = Service()
        assert (await service.post(CHAT, body)).status_code == 200
        shown = service.engine.requests[0].prompt.messages
        assert [message["role"] for message in shown] == [
            "user",
            "assistant",
            "tool",
            "assistant",
            "tool",
        ]
        calls = [message["tool_calls"][0] for message in shown if "tool_calls" in message]
        results = [message for message in shown if message["role"] == "tool"]
        assert [call["id"] for call in calls] == [result["tool_call_id"] for result in results]
        assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls)
        assert calls[0]["function"] == {"name": "weather", "arguments": {"city": "Bern"}}
        assert [result["name"] for result in results] == ["weather", "time"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"functions": [WEATHER], "tools": [{"type": "function", "function": TIME}]}, "functions"),
        ({"functions": "weather"}, "functions"),
        ({"functions": [WEATHER, {"description": "no name"}]}, "functions[1].name"),
        ({"functions": [WEATHER, 3]}, "functions[1]"),
        ({"functions": [WEATHER, WEATHER]}, "functions"),
        ({"functions": [WEATHER], "function_call": "sometimes"}, "function_call"),
        ({"functions": [WEATHER], "function_call": {"name": "time"}}, "function_call"),
        ({"function_call": {"name": "time"}}, "function_call"),
    ],
    ids=str,
)
async def test_shapes_name_a_fault_as_it_was_written(fields, param):
    """Not by today's name."""
    error = refusal(await Service().post(CHAT, HELLO | fields), 400)
    assert error["param"] == param
    assert f"`{param}`" in error["message"]


def tool(name):
    return {"type": "function", "function": {"name": name}}


TOOLS = [tool("a"), tool("b"), tool("c")]


def allow(mode, *names, **form):
    entries = [tool(name) for name in names]
    return {
        "type": "allowed_tools",
        "allowed_tools": {"mode": mode, "tools": entries} | form,
    }


@pytest.mark.parametrize(
    ("mode", "names", "shown"),
    [("auto", ("b",), ["b"]), ("required", ("c", "a"), ["a", "c"]), ("auto", ("a", "x"), ["a"])],
)
async def test_shapes_take_allowed_tools_as_the_tools(mode, names, shown):
    """The others are not even shown: what a model does not see it does not call."""
    service = Service()
    body = HELLO | {"tools": TOOLS, "tool_choice": allow(mode, *names)}
    assert (await service.post(CHAT, body)).status_code == 200
    request = service.engine.requests[0]
    assert [each["function"]["name"] for each in request.prompt.tools] == shown
    assert (request.sampling.structure is not None) is (mode == "required")


@pytest.mark.parametrize(
    "choice",
    [
        allow("auto"),
        allow("auto", "x"),
        allow("sometimes", "a"),
        allow("auto", tools="a"),
        {"type": "allowed_tools"},
        {"type": "allowed_tools", "allowed_tools": 3},
        allow("auto", tools=[3, {"function": 3}, {"function": {"name": 3}}]),
    ],
    ids=str,
)
async def test_shapes_refuse_a_wrong_allowance(choice):
    """Naming the choice."""
    body = HELLO | {"tools": TOOLS, "tool_choice": choice}
    assert refusal(await Service().post(CHAT, body), 400)["param"] == "tool_choice"
    with pytest.raises(InvalidRequest):
        modern(HELLO | {"tool_choice": allow("auto", "a")})


def test_modern_leaves_a_body_of_today_as_it_is():
    """And the one that was sent is not changed."""
    body = HELLO | {"tools": TOOLS, "tool_choice": "auto"}
    assert modern(body) == body
    old = OLD_CHAT | {"messages": [{"role": "function", "name": "f", "content": "x"}]}
    before = json.dumps(old)
    modern(old)
    assert json.dumps(old) == before
