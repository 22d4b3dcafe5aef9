"""`POST /v1/responses`: what the official client sends, reads, streams and raises."""

import asyncio
import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response
from pydantic import BaseModel
from structlog.testing import capture_logs

from serve_app.api.supported_fields import RESPONSES as RESPONSE_FIELDS
from serve_app.errors import EngineDead, Overloaded
from serve_app.protocol import FinishReason
from tests.api.harness import MODEL, Connection, Service, refusal, until
from tests.api.specification import conform
from tests.api.test_openai_sdk import Talk
from tests.fakes import FakeEngine, Pause, Thought

RESPONSES = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
CALL = '{"name": "weather", "parameters": {"city": "Bern"}}'


def events(text):
    """Parse a stream of named events."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    pairs = [block.split("\n") for block in blocks]
    bodies = [json.loads(data.removeprefix("data: ")) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {body['type']}" for body in bodies]
    assert [body["sequence_number"] for body in bodies] == list(range(len(bodies)))
    return bodies


async def test_responses_answer_a_text_with_a_text():
    """The whole object, as OpenAI's document and client have it."""
    async with Talk(Service()) as talk:
        answer = await talk.client.responses.create(
            model=MODEL,
            input="hi",
            instructions="Be brief.",
            temperature=0,
            max_output_tokens=8,
            metadata={"ticket": "7"},
        )
    assert answer.output_text == "Hello, world"
    assert (answer.status, answer.incomplete_details, answer.error) == ("completed", None, None)
    assert answer.usage.total_tokens == 8
    assert answer.usage.input_tokens_details.cached_tokens == 2
    assert (answer.metadata, answer.instructions) == ({"ticket": "7"}, "Be brief.")
    request = talk.service.engine.requests[0]
    assert [m["role"] for m in request.prompt.messages] == ["system", "user"]
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0, 8)
    assert talk.service.records[0].path == RESPONSES


async def test_responses_object_is_as_specified():
    """Every field that OpenAI requires, null where it says so."""
    body = (await Service().post(RESPONSES, {"input": "hi", "tools": [WEATHER]})).json()
    conform(body, "Response")
    assert Response.model_validate(body).model_extra == {}


async def test_responses_stream_builds_the_same_answer():
    """The client's own accumulator ends with what the whole answer says."""
    service = Service(FakeEngine(["Hel", Pause(0.005), "lo"]))
    async with Talk(service) as talk:
        async with talk.client.responses.stream(model=MODEL, input="hi") as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        whole = await talk.client.responses.create(model=MODEL, input="hi")
    assert final.output_text == whole.output_text == "Hello"
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.usage == whole.usage


@pytest.mark.parametrize("script", [["a", "b"], [CALL[:20], CALL[20:]], [""]], ids=str)
async def test_responses_events_are_as_specified(script):
    """Names, numbers from 0, and bodies that fit OpenAI's schema of events."""
    service = Service(FakeEngine(script))
    sent = await service.post(
        RESPONSES, {"input": "hi", "stream": True, "tools": [WEATHER], "model": MODEL}
    )
    bodies = events(sent.text)
    for body in bodies:
        conform(body, "ResponseStreamEvent")
    ends = {"response.completed", "response.incomplete", "error"}
    assert [body["type"] in ends for body in bodies].count(True) == 1
    assert bodies[-1]["response"]["output"] == [
        body["item"] for body in bodies if body["type"] == "response.output_item.done"
    ]


async def test_responses_cut_are_incomplete():
    """Whole or streamed, the status says so, and why."""
    service = Service(FakeEngine(["a", "b"], finish_reason=FinishReason.LENGTH))
    whole = (await service.post(RESPONSES, {"input": "hi"})).json()
    sent = await service.post(RESPONSES, {"input": "hi", "stream": True})
    last = events(sent.text)[-1]
    assert last["type"] == "response.incomplete"
    for body in (whole, last["response"]):
        assert body["status"] == "incomplete"
        assert body["incomplete_details"] == {"reason": "max_output_tokens"}
        assert body["output"][0]["status"] == "incomplete"


async def test_responses_structured_output_is_parsed():
    """`text_format` of the client becomes a schema that is enforced, and its object comes back."""

    class City(BaseModel):
        name: str

    async with Talk(Service(FakeEngine(['{"name": ', '"Bern"}']))) as talk:
        answer = await talk.client.responses.parse(model=MODEL, input="hi", text_format=City)
    assert answer.output_parsed == City(name="Bern")
    structure = talk.service.engine.requests[0].sampling.structure
    assert structure.kind == "json_schema"
    assert "name" in json.loads(structure.definition)["properties"]


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_functions_are_called_and_answered(stream):
    """A call comes as an item; its output goes back as one, beside the call."""
    async with Talk(Service(FakeEngine([CALL[:30], CALL[30:]]))) as talk:
        create = talk.client.responses.create
        asked = {"model": MODEL, "tools": [WEATHER], "tool_choice": "required"}
        if stream:
            reported = [event async for event in await create(input="hi", stream=True, **asked)]
            pieces = [
                e.delta for e in reported if e.type == "response.function_call_arguments.delta"
            ]
            answer = reported[-1].response
            assert "".join(pieces) == answer.output[0].arguments
        else:
            answer = await create(input="hi", **asked)
        (call,) = answer.output
        assert (call.type, call.name, json.loads(call.arguments)) == (
            "function_call",
            "weather",
            {"city": "Bern"},
        )
        await create(
            model=MODEL,
            input=[
                {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
                call.model_dump(),
                {"type": "function_call_output", "call_id": call.call_id, "output": "12 C"},
            ],
        )
    messages = talk.service.engine.requests[-1].prompt.messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool"]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert (messages[2]["name"], messages[2]["content"]) == ("weather", "12 C")


async def test_responses_text_before_a_call_is_an_item_of_its_own():
    """Items stand in the order in which the model wrote them."""
    script = ["Let me look. ", f"<tool_call>{CALL}</tool_call>"]
    body = {"input": "hi", "tools": [WEATHER]}
    output = (await Service(FakeEngine(script)).post(RESPONSES, body)).json()["output"]
    assert [item["type"] for item in output] == ["message", "function_call"]
    assert output[0]["content"][0]["text"] == "Let me look."


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (Overloaded("full", retry_after_s=3), openai.RateLimitError),
        (EngineDead("the replica was lost"), openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_responses_errors_before_the_answer_have_their_status(error, kind, stream):
    """The client raises its class, as for a chat."""
    async with Talk(Service(FakeEngine([error]))) as talk:
        with pytest.raises(kind) as caught:
            await talk.client.responses.create(model=MODEL, input="hi", stream=stream)
    assert caught.value.code == error.code


async def test_responses_error_in_a_stream_is_its_last_event():
    """One terminal event, which the client raises."""
    service = Service(FakeEngine(["a", EngineDead("the replica was lost")]))
    sent = await service.post(RESPONSES, {"input": "hi", "stream": True})
    last = events(sent.text)[-1]
    conform(last, "ResponseErrorEvent")
    assert (last["type"], last["code"]) == ("error", EngineDead.code)
    async with Talk(service) as talk:
        stream = await talk.client.responses.create(model=MODEL, input="hi", stream=True)
        with pytest.raises(openai.APIError, match="replica was lost"):
            async for _ in stream:
                pass


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["hi"]}, "input[0]"),
        ({"input": [{"role": "user"}]}, "input"),
        ({"input": [{"type": "item_reference", "id": "m"}]}, "input[0]"),
        ({"input": [{"type": "reasoning", "id": "r"}]}, "input"),
        ({"input": "hi", "reasoning": 3}, "reasoning"),
        ({"input": "hi", "reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"input": "hi", "include": "x"}, "include"),
        ({"input": "hi", "top_logprobs": 21}, "top_logprobs"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"input": "hi", "instructions": 3}, "instructions"),
        ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "hi", "metadata": {"a": 1}}, "metadata"),
        ({"input": "hi", "tools": [3]}, "tools[0]"),
        ({"input": "hi", "tools": [{"name": "a"}]}, "tools[0].type"),
        (
            {"input": "hi", "tools": [{"type": "web_search"}, {"type": "function"}]},
            "tools[1].name",
        ),
        ({"input": "hi", "tools": [{"type": "mcp"}], "tool_choice": "required"}, "tool_choice"),
        ({"input": "hi", "tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
        ({"input": "hi", "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"input": "hi", "text": 3}, "text"),
        ({"input": "hi", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": "hi", "temperature": 3}, "temperature"),
    ],
    ids=str,
)
async def test_responses_name_a_wrong_field_as_the_client_wrote_it(fields, param):
    """Never by the name that the same thing has in a chat."""
    error = refusal(await Service().post(RESPONSES, fields), 400)
    assert error["param"] == param
    assert f"`{param.partition('[')[0].partition('.')[0]}" in error["message"]


async def test_responses_free_the_engine_when_a_client_goes_away():
    """As for a chat."""
    engine = FakeEngine(["a", Pause()])
    service = Service(engine)
    connection = Connection.json(RESPONSES, {"input": "hi", "stream": True})
    running = connection.run(service.app)
    await connection.arrived.wait()
    connection.disconnect()
    await asyncio.wait_for(running, 5)
    await until(lambda: not engine.running)
    assert engine.closed_early


async def test_responses_write_a_tool_with_its_name_alone_in_full():
    """OpenAI's object requires parameters and strict, which a request may leave out."""
    tools = [{"type": "function", "name": "now"}]
    body = (await Service().post(RESPONSES, {"input": "hi", "tools": tools})).json()
    conform(body, "Response")
    assert body["tools"] == [{**tools[0], "parameters": None, "strict": None}]


async def test_responses_refuse_a_part_whose_kind_is_no_text():
    """Any JSON may stand there, also what Python cannot look up."""
    content = [{"type": {}, "text": "a"}]
    body = {"input": [{"role": "user", "content": content}]}
    assert refusal(await Service().post(RESPONSES, body), 400)["param"] == "input"


CODEX = {
    "instructions": "You are a coding agent.",
    "input": [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"},
        {
            "type": "function_call",
            "id": None,
            "name": "shell",
            "arguments": '{"command": ["ls"]}',
            "call_id": "call_1",
        },
        {"type": "function_call_output", "call_id": "call_1", "output": "README.md"},
        {
            "type": "custom_tool_call",
            "call_id": "call_2",
            "name": "apply_patch",
            "input": "*** Begin",
        },
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": "done"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed"},
    ],
    "tools": [
        {"type": "function", "name": "shell", "strict": False, "parameters": {"type": "object"}},
        {"type": "web_search", "external_web_access": True},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
        {"type": "namespace", "name": "mcp", "tools": []},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "service_tier": "priority",
    "text": {"verbosity": "low"},
    "truncation": "auto",
}


async def test_responses_answer_what_coding_agents_always_send():
    """Thoughts and built-in tools are left out, calls keep their results, and the log says so."""
    service = Service()
    with capture_logs() as logs:
        sent = await service.post(RESPONSES, CODEX)
    last = events(sent.text)[-1]
    assert last["type"] == "response.completed"
    response = last["response"]
    assert [tool["name"] for tool in response["tools"]] == ["shell"]
    assert (response["store"], response["truncation"]) == (False, "disabled")
    assert response["reasoning"] == {"effort": None, "summary": None}
    assert response["service_tier"] == "default"
    conform(response, "Response")
    prompt = service.engine.requests[0].prompt
    assert [message["role"] for message in prompt.messages] == [
        "system",
        "system",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
    ]
    assert prompt.messages[5]["tool_calls"][0]["function"]["arguments"] == {"input": "*** Begin"}
    assert [tool["function"]["name"] for tool in prompt.tools] == ["shell"]
    (line,) = [line for line in logs if line["event"] == "request.tools_left_out"]
    assert (line["log_level"], line["types"]) == ("warning", ["custom", "namespace", "web_search"])


@pytest.mark.parametrize(
    ("choice", "shown", "enforced"),
    [
        ({"type": "function", "name": "b"}, ["a", "b"], ["b"]),
        (
            {
                "type": "allowed_tools",
                "mode": "auto",
                "tools": [{"type": "function", "name": "b"}, {"type": "web_search"}],
            },
            ["b"],
            None,
        ),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "a"}],
            },
            ["a"],
            ["a"],
        ),
    ],
)
async def test_responses_choice_of_tools(choice, shown, enforced):
    """One function, or those that are allowed; the answer repeats what was asked."""
    service = Service()
    tools = [{"type": "function", "name": name} for name in "ab"]
    body = {"input": "hi", "tools": [{"type": "web_search"}, *tools], "tool_choice": choice}
    answer = (await service.post(RESPONSES, body)).json()
    request = service.engine.requests[0]
    assert [tool["function"]["name"] for tool in request.prompt.tools] == shown
    structure = request.sampling.structure
    assert (structure and list(json.loads(structure.definition)["$defs"])) == enforced
    assert answer["tool_choice"] == choice
    conform(answer, "Response")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "alternatives"),
    [
        ({"include": ["message.output_text.logprobs"]}, 0),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 2}, 2),
        ({"top_logprobs": 3}, 3),
        ({}, None),
        ({"top_logprobs": 0}, None),
    ],
    ids=str,
)
async def test_responses_probabilities_come_with_the_text(stream, fields, alternatives):
    """One entry a token, in the deltas and in the complete text."""
    service = Service(FakeEngine(["a", Pause(0.005), "b"]))
    sent = await service.post(RESPONSES, {"input": "hi", "stream": stream} | fields)
    bodies = events(sent.text) if stream else []
    response = bodies[-1]["response"] if stream else sent.json()
    conform(response, "Response")
    for body in bodies:
        conform(body, "ResponseStreamEvent")
    assert response["top_logprobs"] == fields.get("top_logprobs", 0)
    part = response["output"][0]["content"][0]
    if alternatives is None:
        assert part["logprobs"] == []
        return
    assert [entry["token"] for entry in part["logprobs"]] == ["a", "b"]
    assert {len(entry["top_logprobs"]) for entry in part["logprobs"]} == {alternatives}
    deltas = [body for body in bodies if body["type"] == "response.output_text.delta"]
    reported = [entry for body in deltas for entry in body["logprobs"]]
    assert reported == (part["logprobs"] if stream else [])


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_show_no_probabilities_of_a_calls_syntax(stream):
    """They would stand beside a text that they do not belong to."""
    script = ["Look. ", Pause(0.005), f"<tool_call>{CALL}</tool_call>", Pause(0.005), "Done."]
    body = {"input": "hi", "tools": [WEATHER], "top_logprobs": 1, "stream": stream}
    sent = await Service(FakeEngine(script)).post(RESPONSES, body)
    output = (events(sent.text)[-1]["response"] if stream else sent.json())["output"]
    parts = [item["content"][0] for item in output if item["type"] == "message"]
    assert [[entry["token"] for entry in part["logprobs"]] for part in parts] == [
        ["Look. "],
        ["Done."],
    ]


def repeated(response):
    """Return what a response says of its request, as a request."""
    return {name: response[name] for name in RESPONSE_FIELDS.rules if name in response}


texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
SCRIPTS = st.lists(texts, min_size=1, max_size=3) | st.sampled_from(
    [
        [""],
        [CALL],
        [CALL[:20]],
        ["Look. ", f"<tool_call>{CALL}</tool_call>"],
        [f"[{CALL}, {CALL}]"],
    ]
)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "tools": st.sampled_from([[], [WEATHER], [{"type": "function", "name": "now"}]]),
        "instructions": st.sampled_from(["Be brief."]),
        "metadata": st.sampled_from([{}, {"a": "b"}]),
        "top_logprobs": st.integers(0, 3),
        "temperature": st.sampled_from([0, 0.5]),
        "max_output_tokens": st.sampled_from([16, 100]),
        "parallel_tool_calls": st.booleans(),
        "reasoning": st.sampled_from([{"effort": "low"}, {"effort": None, "summary": None}]),
        "store": st.booleans(),
        "user": st.just("u"),
        "text": st.sampled_from(
            [
                {"verbosity": "high"},
                {"format": {"type": "json_object"}},
                {"format": {"type": "json_schema", "name": "a", "schema": {"type": "object"}}},
            ]
        ),
    },
)


@settings(max_examples=60, deadline=None)
@given(script=SCRIPTS, asked=ASKED, reason=st.sampled_from(FinishReason), stream=st.booleans())
async def test_responses_can_all_be_sent_back(script, asked, reason, stream):
    """Its items as input and its fields as fields: each answer is a request that is answered."""
    service = Service(FakeEngine(script, finish_reason=reason))
    sent = await service.post(RESPONSES, {"input": "hi", "stream": stream} | asked)
    if sent.status_code != 200:  # a format beside tools that cannot be enforced together
        return
    first = events(sent.text)[-1]["response"] if stream else sent.json()
    before, after = ({"role": "user", "content": text} for text in ("hi", "go on"))
    back = repeated(first) | {"input": [before, *first["output"], after]}
    again = await service.post(RESPONSES, back)
    assert again.status_code == 200, again.text
    second = again.json()
    differ = {"id", "created_at", "completed_at", "output", "usage"}
    assert {k: v for k, v in second.items() if k not in differ} == {
        k: v for k, v in first.items() if k not in differ
    }
    shown = service.engine.requests[-1].prompt.messages
    assert len(shown) >= 2 + bool(first["output"])


THINKS = [Thought("I may"), Pause(0.002), Thought(" know."), "Hello", Pause(0.002), " you"]


@pytest.mark.parametrize("stream", [False, True])
async def test_responses_thoughts_are_an_item_before_the_answer(stream):
    """As OpenAI's own models that show them; each event and item is as it is specified."""
    response = await Service(FakeEngine(THINKS)).post(RESPONSES, {"input": "hi", "stream": stream})
    body = response.json() if not stream else events(response.text)[-1]["response"]
    conform(body, "Response")
    thoughts, message = body["output"]
    assert (thoughts["type"], thoughts["status"], thoughts["summary"]) == (
        "reasoning",
        "completed",
        [],
    )
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "I may know."}]
    assert message["content"][0]["text"] == "Hello you"
    if stream:
        reported = events(response.text)
        for event in reported:
            conform(event, "ResponseStreamEvent")
        deltas = [e["delta"] for e in reported if e["type"] == "response.reasoning_text.delta"]
        assert "".join(deltas) == "I may know."


async def test_responses_take_thoughts_of_an_answer_back():
    """The item is left out: its model's template shows none of an earlier answer's."""
    service = Service(FakeEngine(THINKS))
    output = (await service.post(RESPONSES, {"input": "hi"})).json()["output"]
    asked = [{"role": "user", "content": "hi"}, *output, {"role": "user", "content": "so?"}]
    assert (await service.post(RESPONSES, {"input": asked})).status_code == 200
    messages = service.engine.requests[-1].prompt.messages
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]


async def test_responses_ids_of_calls_are_what_every_template_takes():
    """Nine letters and digits, as Mistral's want them."""
    body = {"input": "hi", "tools": [WEATHER]}
    output = (await Service(FakeEngine([CALL])).post(RESPONSES, body)).json()["output"]
    assert len(output[0]["call_id"]) == 9
    assert output[0]["call_id"].isalnum()
