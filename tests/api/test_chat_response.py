"""Tool calls in chat answers, whole and streamed."""

import json
import re

import pytest

from serve_app.api.formats.table import MARKS
from serve_app.protocol import FinishReason
from tests.api.harness import CHAT, HELLO, Service, events, refusal
from tests.api.specification import conform
from tests.fakes import FakeEngine, Pause, Thought

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "search")
]
LLAMA = ['{"name": "weather", "para', Pause(0.002), 'meters": {"city"', Pause(0.002), ': "Bern"}}']
HERMES = [
    "I look.\n<tool",
    Pause(0.002),
    '_call>{"name": "search", "arguments": {}}</tool_call>\n<tool_call>{"name": "weather", ',
    Pause(0.002),
    '"arguments": {"city": "Bern"}}</tool_call>',
]


def added_up(chunks):
    """Return the first choice's message and finish as a client adds them up."""
    content, calls = None, []
    for chunk in chunks:
        conform(chunk, "CreateChatCompletionStreamResponse")
        delta = chunk["choices"][0]["delta"]
        if delta.get("content"):
            content = (content or "") + delta["content"]
        for piece in delta.get("tool_calls", []):
            if "id" in piece:
                assert piece["index"] == len(calls)
                calls.append((piece["function"]["name"], ""))
            name, arguments = calls[piece["index"]]
            calls[piece["index"]] = (name, arguments + piece["function"]["arguments"])
    return content, calls, chunks[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    ("script", "content", "calls"),
    [
        (LLAMA, None, [("weather", '{"city": "Bern"}')]),
        (HERMES, "I look.", [("search", "{}"), ("weather", '{"city": "Bern"}')]),
    ],
)
async def test_chat_response_reports_calls_alike_whole_and_streamed(script, content, calls):
    """Content is null without words; every call has its own id; the finish says why."""
    service = Service(FakeEngine(script))
    body = (await service.chat(tools=TOOLS, n=2)).json()
    conform(body, "CreateChatCompletionResponse")
    ids = set()
    for choice in body["choices"]:
        message = choice["message"]
        assert (message["content"], choice["finish_reason"]) == (content, "tool_calls")
        reported = [call["function"] for call in message["tool_calls"]]
        assert [(call["name"], call["arguments"]) for call in reported] == calls
        ids |= {call["id"] for call in message["tool_calls"]}
    assert len(ids) == 2 * len(calls)
    chunks = events(await service.chat(tools=TOOLS, stream=True))[:-1]
    assert added_up(chunks) == (content, calls, "tool_calls")


async def test_chat_response_streams_a_calls_arguments_as_they_come():
    """Id, type and name first, then the arguments in pieces."""
    chunks = events(await Service(FakeEngine(LLAMA)).chat(tools=TOOLS, stream=True))[:-1]
    first, *pieces = [
        call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])
    ]
    assert re.fullmatch("[a-zA-Z0-9]{9}", first.pop("id"))  # Mistral's templates take no other
    assert first == {
        "index": 0,
        "type": "function",
        "function": {"name": "weather", "arguments": ""},
    }
    assert pieces == [
        {"index": 0, "function": {"arguments": '{"city"'}},
        {"index": 0, "function": {"arguments": ': "Bern"}'}},
    ]


@pytest.mark.parametrize(
    "text", ["Hello", '{"city": "Bern"}', '{"name": "other", "parameters": {}}', "<tool_call>{"]
)
async def test_chat_response_shows_text_that_is_no_call_as_content(text):
    """Word for word, with its own finish, and without `tool_calls`."""
    service = Service(FakeEngine([text]))
    choice = (await service.chat(tools=TOOLS)).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
    assert choice["finish_reason"] == "stop"
    chunks = events(await service.chat(tools=TOOLS, stream=True))[:-1]
    assert added_up(chunks) == (text, [], "stop")


@pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
async def test_chat_response_without_tools_shows_a_call_as_text(fields):
    """Nobody asked for calls, so nothing is taken for one."""
    body = (await Service(FakeEngine(LLAMA)).chat(**fields)).json()
    assert body["choices"][0]["message"]["content"].startswith('{"name": "weather"')


async def test_chat_response_says_that_a_call_is_cut_off():
    """The finish is `length`: the arguments are not whole."""
    engine = FakeEngine(LLAMA[:3], finish_reason=FinishReason.LENGTH)
    choice = (await Service(engine).chat(tools=TOOLS)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city"'


async def test_chat_response_has_one_call_only_where_parallel_calls_are_off():
    """A further one is left out."""
    service = Service(FakeEngine(HERMES))
    message = (await service.chat(tools=TOOLS, parallel_tool_calls=False)).json()["choices"][0][
        "message"
    ]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["search"]
    assert message["content"] == "I look."


async def test_chat_response_reports_all_logprobs_of_a_call():
    """Tokens whose text is held back, or is syntax, are reported with what comes next."""
    service = Service(FakeEngine(HERMES))
    chunks = events(await service.chat(tools=TOOLS, stream=True, logprobs=True))[:-1]
    reported = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    tokens = [one["token"] for logprobs in reported if logprobs for one in logprobs["content"]]
    assert tokens == [step for step in HERMES if isinstance(step, str)]


async def test_chat_response_with_calls_goes_back_to_the_model():
    """The answer's own message, then the tool's: both reach the template."""
    service = Service(FakeEngine(LLAMA))
    message = (await service.chat(tools=TOOLS)).json()["choices"][0]["message"]
    call = message["tool_calls"][0]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}
    asked = {"role": "user", "content": "hi"}
    response = await service.chat(messages=[asked, message, result], tools=TOOLS)
    assert response.status_code == 200
    prompt = service.engine.requests[1].prompt
    assert prompt.messages[1]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": {"city": "Bern"},
    }
    assert prompt.messages[2]["tool_call_id"] == call["id"]
    assert json.dumps(prompt.tools)


FORCED = [
    {"tool_choice": "required"},
    {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
]


@pytest.mark.parametrize("choice", FORCED)
@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ('[{"name": "weather", "parameters":', []),
        (
            '[{"name": "weather", "parameters": {}}, {"name": "search", "parameters":',
            [("weather", "{}")],
        ),
    ],
)
async def test_chat_response_shows_no_syntax_of_a_forced_call_that_is_cut(choice, text, calls):
    """The limit came within a call: no content, and the finish says why."""
    service = Service(FakeEngine([*text], finish_reason=FinishReason.LENGTH))
    choice = {"tools": TOOLS, **choice}
    message = (await service.chat(**choice)).json()["choices"][0]["message"]
    assert not message["content"]
    assert len(message.get("tool_calls", [])) == len(calls)
    chunks = events(await service.chat(stream=True, **choice))[:-1]
    assert added_up(chunks) == (None, calls, "length")


async def test_chat_response_gives_marks_of_calls_a_text_where_tools_are():
    """Many of them are special tokens, which nobody would see."""
    service = Service(FakeEngine(["hi"]))
    await service.chat(tools=TOOLS)
    await service.chat()
    kept = [request.sampling.keep_special_tokens for request in service.engine.requests]
    assert kept == [MARKS, ()]
    assert {"<|python_tag|>", "<|python_start|>", "[TOOL_CALLS]", "<tool_call>"} <= set(MARKS)


THINKS = [Thought("I may"), Pause(0.002), Thought(" call."), "Hello", Pause(0.002), " you"]


async def test_chat_response_reports_thoughts_beside_the_answer():
    """As `reasoning_content`, whole and in deltas, and only where there are any."""
    service = Service(FakeEngine(THINKS))
    body = (await service.chat()).json()
    conform(body, "CreateChatCompletionResponse")
    message = body["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("I may call.", "Hello you")
    chunks = events(await service.chat(stream=True))[:-1]
    thoughts = [chunk["choices"][0]["delta"].get("reasoning_content") for chunk in chunks]
    assert "".join(filter(None, thoughts)) == "I may call."
    assert added_up(chunks)[0] == "Hello you"
    plain = (await Service().chat()).json()["choices"][0]["message"]
    assert "reasoning_content" not in plain


async def test_chat_response_can_leave_thoughts_out():
    """`include_reasoning: false`; the answer is the same."""
    service = Service(FakeEngine(THINKS))
    body = (await service.chat(include_reasoning=False)).json()
    assert body["choices"][0]["message"] == {
        "role": "assistant",
        "content": "Hello you",
        "refusal": None,
    }
    response = await service.chat(include_reasoning=False, stream=True)
    assert "reasoning" not in response.text


@pytest.mark.parametrize(
    ("fields", "splits", "shows"),
    [
        ({}, True, True),
        ({"reasoning_format": "auto", "separate_reasoning": True}, True, True),
        ({"reasoning_format": "deepseek"}, True, True),
        ({"reasoning_format": "parsed"}, True, True),
        ({"reasoning_format": "none"}, False, True),
        ({"reasoning_format": "raw"}, False, True),
        ({"separate_reasoning": False}, False, True),
        ({"reasoning_format": "hidden"}, True, False),
        ({"reasoning_format": "none", "include_reasoning": False}, True, False),
        ({"separate_reasoning": False, "reasoning_format": "hidden"}, True, False),
    ],
)
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
async def test_chat_response_shows_thoughts_where_a_client_wants_them(path, fields, splits, shows):
    """In a field of their own, in the content (llama.cpp, Groq, SGLang), or not at all."""
    service = Service(FakeEngine(THINKS))
    question = HELLO if path == CHAT else {"input": "hi"}
    answer = await service.post(path, question | fields)
    assert ("I may call." in answer.text) is shows
    (request,) = service.engine.requests
    assert request.sampling.split_thoughts is splits


@pytest.mark.parametrize(
    "fields", [{"reasoning_format": "deepseek-legacy"}, {"separate_reasoning": "no"}]
)
async def test_chat_response_refuses_to_show_thoughts_anywhere_else(fields):
    """By name."""
    error = refusal(await Service().chat(**fields), 400)
    assert error["param"] == next(iter(fields))


async def test_chat_response_has_no_call_that_is_only_thought_of():
    """The reader of calls sees the answer alone."""
    script = [Thought('{"name": "search", "parameters": {}}'), *LLAMA]
    message = (await Service(FakeEngine(script)).chat(tools=TOOLS)).json()["choices"][0]["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather"]


async def test_chat_response_reports_ids_where_they_are_asked_for():
    """The prompt's once, the completion's with the text they belong to, all of them."""
    service = Service(FakeEngine(HERMES))
    body = (await service.chat(tools=TOOLS, return_token_ids=True, n=2)).json()
    assert body["prompt_token_ids"] == [0, 1, 2, 3, 4]
    assert [choice["token_ids"] for choice in body["choices"]] == [[1, 2, 3], [1, 2, 3]]
    chunks = events(await service.chat(tools=TOOLS, return_token_ids=True, stream=True))[:-1]
    assert [chunk.get("prompt_token_ids") for chunk in chunks][:2] == [[0, 1, 2, 3, 4], None]
    reported = [chunk["choices"][0].get("token_ids", []) for chunk in chunks]
    assert [token for ids in reported for token in ids] == [1, 2, 3]
    assert "token_ids" not in (await service.chat()).text
