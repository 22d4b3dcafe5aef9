"""The official client against the application on a real socket."""

import asyncio
import json

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from serve_app.errors import ContextLengthExceeded, EngineDead, EngineError, Overloaded
from serve_app.protocol import FinishReason
from tests.api.harness import MODEL, Service, listening, until
from tests.fakes import FakeEngine, Pause

MESSAGES = [{"role": "user", "content": "hi"}]


class Talk:
    """A client of a listening service."""

    def __init__(self, service, **options):
        self.service = service
        self._options = options

    async def __aenter__(self):
        self._listening = listening(self.service.app)
        url = await self._listening.__aenter__()
        options = {"api_key": "none", "max_retries": 0, "timeout": 10} | self._options
        self.client = AsyncOpenAI(base_url=f"{url}/v1", **options)
        return self

    async def __aexit__(self, *exc):
        await self.client.close()
        await self._listening.__aexit__(None, None, None)

    async def chat(self, **fields):
        return await self.client.chat.completions.create(model=MODEL, messages=MESSAGES, **fields)


async def test_openai_sdk_chat():
    """An answer with everything the client's types hold."""
    async with Talk(Service()) as talk:
        answer = await talk.chat(temperature=0, max_completion_tokens=8, seed=1, n=2)
    assert [choice.message.content for choice in answer.choices] == ["Hello, world"] * 2
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 2
    assert answer.choices[0].message.refusal is None
    assert answer.usage.total_tokens == 11
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id == talk.service.records[0].request_id
    sampling = talk.service.engine.requests[0].sampling
    assert (sampling.temperature, sampling.max_tokens, sampling.seed) == (0, 8, 1)


async def test_openai_sdk_stream_of_chat():
    """Chunks add up to the answer; the usage comes last."""
    service = Service(FakeEngine(["Hel", Pause(0.01), "lo"], finish_reason=FinishReason.LENGTH))
    async with Talk(service) as talk:
        stream = await talk.chat(stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    texts = [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]
    assert "".join(texts) == "Hello"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == 2


async def test_openai_sdk_accumulator():
    """`chat.completions.stream` builds the final completion from our chunks."""
    async with (
        Talk(Service(FakeEngine(["a", Pause(0.005), "b"]))) as talk,
        talk.client.chat.completions.stream(model=MODEL, messages=MESSAGES, n=2) as stream,
    ):
        final = await stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == ["ab", "ab"]
    assert [choice.finish_reason for choice in final.choices] == ["stop", "stop"]


async def test_openai_sdk_completions():
    """One text, several prompts, and a stream."""
    async with Talk(Service(FakeEngine(["a", "b"]))) as talk:
        create = talk.client.completions.create
        assert (await create(model=MODEL, prompt="Once")).choices[0].text == "ab"
        several = await create(model=MODEL, prompt=["x", "y"])
        assert [choice.index for choice in several.choices] == [0, 1]
        stream = await create(model=MODEL, prompt=[1, 2, 3], stream=True)
        assert "".join([chunk.choices[0].text async for chunk in stream]) == "ab"


async def test_openai_sdk_models():
    """List and retrieve, though the id has a slash."""
    async with Talk(Service()) as talk:
        models = await talk.client.models.list()
        assert [model.id for model in models.data] == [MODEL]
        assert (await talk.client.models.retrieve(MODEL)).owned_by == "acme"
        with pytest.raises(openai.NotFoundError):
            await talk.client.models.retrieve("gpt-9")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ContextLengthExceeded("too long", param="messages"), openai.BadRequestError),
        (Overloaded("full", retry_after_s=3), openai.RateLimitError),
        (EngineError("generation failed"), openai.InternalServerError),
        (EngineDead("the replica was lost"), openai.InternalServerError),
    ],
)
async def test_openai_sdk_errors(error, kind, stream):
    """Status, code, param and request id arrive; streams that fail early as well."""
    async with Talk(Service(FakeEngine([error]))) as talk:
        with pytest.raises(kind) as caught:
            await talk.chat(stream=stream)
    assert caught.value.status_code == error.http_status
    assert caught.value.code == error.code
    assert caught.value.param == error.param
    assert caught.value.request_id == talk.service.records[0].request_id
    assert caught.value.response.headers.get("retry-after") == {429: "3", 503: "5"}.get(
        error.http_status
    )


async def test_openai_sdk_wrong_requests():
    """Bad values, refused fields, and another model."""
    async with Talk(Service()) as talk:
        with pytest.raises(openai.BadRequestError) as caught:
            await talk.chat(temperature=3)
        assert caught.value.param == "temperature"
        with pytest.raises(openai.BadRequestError) as caught:
            await talk.chat(modalities=["text", "audio"])
        assert (caught.value.code, caught.value.param) == (
            "unsupported_parameter",
            "modalities",
        )
        with pytest.raises(openai.NotFoundError) as caught:
            await talk.client.chat.completions.create(model="gpt-9", messages=MESSAGES)
        assert caught.value.code == "model_not_found"
    assert not talk.service.engine.requests


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = ['{"name": "weather", ', Pause(0.005), '"parameters": {"city"', Pause(0.005), ': "Bern"}}']


async def test_openai_sdk_tools():
    """A call, its result sent back, and the answer to it."""
    scripts = iter([CALL, ["sunny"]])
    async with Talk(Service(FakeEngine(lambda request: next(scripts)))) as talk:
        create = talk.client.chat.completions.create
        first = (await create(model=MODEL, messages=MESSAGES, tools=[WEATHER])).choices[0]
        assert first.finish_reason == "tool_calls"
        (call,) = first.message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        result = {"role": "tool", "tool_call_id": call.id, "content": "it is sunny"}
        messages = [*MESSAGES, first.message, result]
        second = await create(model=MODEL, messages=messages, tools=[WEATHER])
    assert second.choices[0].message.content == "sunny"
    assert second.choices[0].message.tool_calls is None
    sent = talk.service.engine.requests[1].prompt.messages
    assert sent[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert sent[2]["tool_call_id"] == call.id


async def test_openai_sdk_stream_of_tools():
    """The client's accumulator puts the call together and reports its arguments' pieces."""
    async with (
        Talk(Service(FakeEngine(CALL))) as talk,
        talk.client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, tools=[WEATHER], tool_choice="required"
        ) as stream,
    ):
        seen = [event async for event in stream]
        final = await stream.get_final_completion()
    pieces = [one for one in seen if one.type == "tool_calls.function.arguments.delta"]
    assert "".join(piece.arguments_delta for piece in pieces) == '{"city": "Bern"}'
    assert len(pieces) > 1
    assert [one.name for one in seen if one.type == "tool_calls.function.arguments.done"] == [
        "weather"
    ]
    (call,) = final.choices[0].message.tool_calls
    assert call.function.arguments == '{"city": "Bern"}'
    assert final.choices[0].finish_reason == "tool_calls"
    assert talk.service.engine.requests[0].sampling.structure.kind == "json_schema"


class Weather(BaseModel):
    """Asks for a city's weather."""

    city: str
    days: int


async def test_openai_sdk_pydantic_tools():
    """`parse` gives the arguments as an object of the tool's class."""
    script = ['{"name": "Weather", "parameters": {"city": "Bern", "days": 2}}']
    async with Talk(Service(FakeEngine(script))) as talk:
        answer = await talk.client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, tools=[openai.pydantic_function_tool(Weather)]
        )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Bern", days=2)


@pytest.mark.parametrize("stream", [False, True])
async def test_openai_sdk_structured_output(stream):
    """`parse` and its stream send the class's schema and read the answer as its object."""
    service = Service(FakeEngine(['{"city": ', Pause(0.002), '"Bern", "days": 3}']))
    asked = {"model": MODEL, "messages": MESSAGES, "response_format": Weather}
    async with Talk(service) as talk:
        if stream:
            async with talk.client.chat.completions.stream(**asked) as events:
                answer = await events.get_final_completion()
        else:
            answer = await talk.client.chat.completions.parse(**asked)
    assert answer.choices[0].message.parsed == Weather(city="Bern", days=3)
    structure = service.engine.requests[0].sampling.structure
    assert structure.kind == "json_schema"
    assert list(json.loads(structure.definition)["properties"]) == ["city", "days"]


async def test_openai_sdk_logprobs():
    """The client's types hold them in both endpoints, streamed as well."""
    async with Talk(Service(FakeEngine(["a", Pause(0.002), "b"]))) as talk:
        answer = await talk.chat(logprobs=True, top_logprobs=2)
        content = answer.choices[0].logprobs.content
        assert [(one.token, one.bytes) for one in content] == [("a", [97]), ("b", [98])]
        assert content[0].top_logprobs[0].logprob == content[0].logprob
        async with talk.client.chat.completions.stream(
            model=MODEL, messages=MESSAGES, logprobs=True
        ) as stream:
            final = await stream.get_final_completion()
        assert [one.token for one in final.choices[0].logprobs.content] == ["a", "b"]
        texts = await talk.client.completions.create(
            model=MODEL, prompt=[5, 6], echo=True, logprobs=1, max_tokens=1
        )
    assert texts.choices[0].text == "5 6ab"
    assert texts.choices[0].logprobs.tokens == ["5", " 6", "a", "b"]
    assert texts.choices[0].logprobs.text_offset == [0, 1, 3, 4]


async def test_openai_sdk_missing_key(tmp_path):
    """401 is the client's AuthenticationError."""
    (tmp_path / "keys").write_text("")
    async with Talk(Service(api_keys_file=str(tmp_path / "keys"))) as talk:
        with pytest.raises(openai.AuthenticationError):
            await talk.chat()


async def test_openai_sdk_stream_that_breaks():
    """The text before arrives, then an APIError with our message and code."""
    service = Service(FakeEngine(["a", Pause(0.01), EngineDead("the replica was lost")]))
    async with Talk(service) as talk:
        stream = await talk.chat(stream=True)
        texts = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError, match="the replica was lost") as caught:
            await anext(stream)
    assert caught.value.code == "engine_dead"
    assert texts == ["", "a"]


async def test_openai_sdk_retry_after_429():
    """The client waits as asked and asks again."""
    scripts = iter([[Overloaded("full", retry_after_s=1)], ["a"]])
    service = Service(FakeEngine(lambda request: next(scripts)))
    async with Talk(service, max_retries=1) as talk:
        answer = await talk.chat()
    assert answer.choices[0].message.content == "a"
    assert [record.status for record in service.records] == [429, 200]


async def test_openai_sdk_leaving_a_stream_frees_the_engine():
    """Closing the response reaches the engine through the socket."""
    service = Service(FakeEngine(["a", Pause(), "b"]))
    async with Talk(service) as talk:
        stream = await talk.chat(stream=True)
        await anext(stream)
        await stream.close()
        await until(lambda: not service.engine.running)
    assert len(service.engine.closed_early) == 1
    assert [record.error_code for record in service.records] == ["request_cancelled"]


async def test_openai_sdk_cancelling_a_whole_answer_frees_the_engine():
    """A caller that stops waiting ends the work too."""
    service = Service(FakeEngine([Pause(), "a"]))
    async with Talk(service) as talk:
        asking = asyncio.create_task(talk.chat())
        await until(lambda: service.engine.running)
        asking.cancel()
        await until(lambda: not service.engine.running)
    assert [record.error_code for record in service.records] == ["request_cancelled"]


async def test_openai_sdk_synchronous_client():
    """The blocking flavour of the client, from a thread."""

    def ask(url):
        with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client:
            stream = client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    async with listening(Service().app) as url:
        assert await asyncio.to_thread(ask, url) == "Hello, world"


async def test_openai_sdk_many_streams_at_once():
    """Fifty streams, each with its own text and one end."""
    service = Service(FakeEngine(lambda request: [request.request_id[:8], Pause(0.02), "."]))

    async def ask(talk, number):
        headers = {"x-request-id": f"client{number:02}"}
        stream = await talk.chat(stream=True, extra_headers=headers)
        chunks = [chunk async for chunk in stream]
        ends = [
            chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason
        ]
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), ends

    async with Talk(service) as talk:
        answers = await asyncio.gather(*(ask(talk, number) for number in range(50)))
    assert answers == [(f"client{number:02}.", ["stop"]) for number in range(50)]
