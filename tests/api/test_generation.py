"""A request's whole way: order of events, early refusals, broken streams, cancels, deadlines."""

import asyncio
import json

import pytest

from serve_app.errors import ContextLengthExceeded, EngineDead, EngineError, Overloaded
from serve_app.protocol import FinishReason
from tests.api.harness import (
    CHAT,
    COMPLETIONS,
    HELLO,
    MODEL,
    Connection,
    Service,
    events,
    refusal,
    until,
)
from tests.fakes import FakeEngine, Pause

STREAM = {"stream": True}
SMALLEST = {CHAT: HELLO, COMPLETIONS: {"prompt": "Once"}}
STREAMS = [False, True]
PATHS = [CHAT, COMPLETIONS]


async def test_stream_of_a_chat_has_one_order():
    """Role, text, finish, `[DONE]`; one id and one time in all."""
    engine = FakeEngine(["Hel", Pause(0.01), "lo", Pause(0.01), "!"])
    *chunks, last = events(await Service(engine).chat(stream=True))
    assert last == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": "", "refusal": None},
        {"content": "Hel"},
        {"content": "lo"},
        {"content": "!"},
        {},
    ]
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * 4 + ["stop"]
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert not any("usage" in chunk for chunk in chunks)


async def test_stream_of_a_completion_has_no_role():
    """Text, finish, `[DONE]`."""
    *chunks, last = events(await Service(FakeEngine(["a"])).complete(stream=True))
    assert last == "[DONE]"
    choices = [
        (chunk["choices"][0]["text"], chunk["choices"][0]["finish_reason"]) for chunk in chunks
    ]
    assert choices == [("a", None), ("", "stop")]


async def test_stream_has_usage_once_between_finish_and_done():
    """Only the last chunk has it, with no choices; the others say null."""
    response = await Service().chat(stream=True, n=2, stream_options={"include_usage": True})
    *chunks, usage, _done = events(response)
    assert usage["choices"] == []
    assert usage["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 6,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 2},
    }
    assert [chunk["usage"] for chunk in chunks] == [None] * 6


async def test_stream_with_continuous_usage_grows():
    """Every chunk has the total so far."""
    engine = FakeEngine(["a", Pause(0.01), "b"])
    options = {"continuous_usage_stats": True, "include_usage": True}
    *chunks, _done = events(await Service(engine).complete(stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 2, 2]


async def test_stream_interleaves_choices_by_index():
    """Each index has its own role and finish; texts add up to the whole answers'."""
    service = Service(FakeEngine(["a", Pause(0.005), "b", Pause(0.005), "c"]))
    *chunks, _done = events(await service.chat(stream=True, n=3))
    order = [chunk["choices"][0]["index"] for chunk in chunks]
    assert order != sorted(order)
    for index in range(3):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "abc"
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == ["stop"]


async def test_generation_answers_several_prompts_in_order():
    """Indexes are prompt times n plus choice, whoever finishes first."""

    def slow_first(request):
        text = request.prompt.text
        return [Pause(0.02 if text == "a" else 0.0), f"{text}!"]

    body = (await Service(FakeEngine(slow_first)).complete(prompt=["a", "b"], n=2)).json()
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (0, "a!"),
        (1, "a!"),
        (2, "b!"),
        (3, "b!"),
    ]
    assert body["usage"]["prompt_tokens"] == 10


@pytest.mark.parametrize("stream", STREAMS)
async def test_generation_of_an_empty_answer(stream):
    """A model that ends at once gives an empty text and a finish."""
    response = await Service(FakeEngine([""])).chat(stream=stream)
    if stream:
        assert [chunk["choices"][0]["delta"] for chunk in events(response)[:-1]] == [
            {"role": "assistant", "content": "", "refusal": None},
            {},
        ]
    else:
        assert response.json()["choices"][0]["message"]["content"] == ""


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full", retry_after_s=7), 429, "rate_limit_error"),
        (ContextLengthExceeded("too long", param="messages"), 400, "invalid_request_error"),
        (EngineDead("the replica was lost"), 503, "server_error"),
        (EngineError("generation failed"), 500, "server_error"),
    ],
)
async def test_generation_gives_an_early_error_its_own_status(error, status, kind, path, stream):
    """The engine's refusal comes before a status is sent, for streams as well."""
    response = await Service(FakeEngine([error])).post(path, SMALLEST[path] | {"stream": stream})
    answer = refusal(response, status)
    assert (answer["type"], answer["code"], answer["message"]) == (kind, error.code, error.message)
    assert answer["param"] == error.param
    assert response.headers.get("retry-after") == {429: "7", 503: "5"}.get(status)


@pytest.mark.parametrize("path", PATHS)
async def test_stream_that_breaks_ends_with_one_error_event(path):
    """Text that came stays; then the envelope, no finish, no `[DONE]`."""
    service = Service(FakeEngine(["a", Pause(0.01), EngineDead("the replica was lost")]))
    *chunks, last = events(await service.post(path, SMALLEST[path] | STREAM))
    assert last == {
        "error": {
            "message": "the replica was lost",
            "type": "server_error",
            "param": None,
            "code": "engine_dead",
        }
    }
    assert not any(choice["finish_reason"] for chunk in chunks for choice in chunk["choices"])
    (record,) = service.records
    assert (record.status, record.error_code, record.finish_reason) == (503, "engine_dead", None)
    assert record.completion_tokens == 1


@pytest.mark.parametrize("stream", STREAMS)
async def test_generation_shows_nothing_of_a_foreign_exception(stream):
    """Its text stays inside; the client gets the request id to ask with."""
    fault = ValueError("secret /path/to/file")
    script = ["a", Pause(0.01), fault] if stream else [fault]
    service = Service(FakeEngine(script))
    response = await service.post(CHAT, HELLO | {"stream": stream}, headers={"x-request-id": "abc"})
    assert "secret" not in response.text
    error = events(response)[-1]["error"] if stream else refusal(response, 500)
    assert error["message"] == "generation failed (request abc)"
    assert service.records[0].status == 500


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("path", PATHS)
async def test_generation_frees_the_engine_when_a_client_leaves(path, stream):
    """The iterator is closed at once and the request is recorded as cancelled."""
    service = Service(FakeEngine(["a", Pause(), "b"]))
    connection = Connection.json(path, SMALLEST[path] | {"stream": stream})
    running = connection.run(service.app)
    await until(lambda: service.engine.running and (connection.sent or not stream))
    connection.disconnect()
    await asyncio.wait_for(running, 5)
    assert not service.engine.running
    assert len(service.engine.closed_early) == 1
    (record,) = service.records
    assert (record.status, record.error_code) == (499, "request_cancelled")
    assert b"[DONE]" not in connection.body


@pytest.mark.parametrize("stream", STREAMS)
async def test_generation_frees_the_engine_when_its_task_is_cancelled(stream):
    """Ray Serve cancels the request's task when the client has gone."""
    service = Service(FakeEngine(["a", Pause(), "b"]))
    running = Connection.json(CHAT, HELLO | {"stream": stream, "n": 2}).run(service.app)
    await until(lambda: service.engine.running)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not service.engine.running
    assert [record.error_code for record in service.records] == ["request_cancelled"]


async def test_generation_frees_the_engine_when_a_connection_breaks_while_sending():
    """An OSError from the server's send means that nobody listens."""
    service = Service(FakeEngine(["a", Pause(0.02), "b", Pause(), "c"]))
    connection = Connection.json(CHAT, HELLO | STREAM)
    running = connection.run(service.app)
    await connection.arrived.wait()
    connection.broken = True
    await asyncio.wait_for(running, 5)
    assert not service.engine.running
    assert [record.error_code for record in service.records] == ["request_cancelled"]


async def test_generation_ignores_a_client_that_leaves_after_the_end():
    """A whole answer is a finished request, however fast the client hangs up."""
    service = Service()
    connection = Connection.json(CHAT, HELLO | STREAM)
    running = connection.run(service.app)
    await until(lambda: connection.body.endswith(b"[DONE]\n\n"))
    connection.disconnect()
    await running
    assert [record.error_code for record in service.records] == [None]


@pytest.mark.parametrize("script", [[Pause(), "a"], ["a", Pause(), "b"]], ids=["early", "late"])
async def test_deadline_before_the_answer_is_a_504(script):
    """The request's own limit ends it and frees the engine."""
    service = Service(FakeEngine(script))
    response = await service.post(CHAT, HELLO, headers={"x-request-timeout-seconds": "0.05"})
    assert refusal(response, 504)["code"] == "deadline_exceeded"
    assert not service.engine.running


async def test_deadline_in_a_stream_is_an_error_event():
    """What came stays; the event names the limit."""
    service = Service(FakeEngine(["a", Pause(), "b"]))
    headers = {"x-request-timeout-seconds": "0.05"}
    *_chunks, last = events(await service.post(CHAT, HELLO | STREAM, headers=headers))
    assert last["error"]["code"] == "deadline_exceeded"
    assert last["error"]["param"] == "x-request-timeout-seconds"
    assert not service.engine.running


async def test_deadline_covers_a_body_that_does_not_come():
    """A slow sender is bounded by the same limit."""
    connection = Connection(CHAT, headers={"x-request-timeout-seconds": "0.05"})
    await asyncio.wait_for(connection.run(Service().app), 5)
    assert connection.status == 504


async def test_deadline_of_the_client_is_not_a_timeout_of_the_engine():
    """A TimeoutError from inside is a fault of ours."""
    response = await Service(FakeEngine([TimeoutError()])).chat()
    assert refusal(response, 500)["code"] == "engine_error"


@pytest.mark.parametrize("path", PATHS)
async def test_generation_does_not_find_another_model(path):
    """404 that names the one that is served; no work is done."""
    service = Service()
    error = refusal(await service.post(path, SMALLEST[path] | {"model": "gpt-9"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert MODEL in error["message"]
    assert "gpt-9" not in error["message"]
    assert not service.engine.requests


async def test_generation_takes_the_model_named_or_left_out():
    """Both are the same request."""
    service = Service()
    for model in ({}, {"model": None}, {"model": MODEL}):
        assert (await service.chat(**model)).status_code == 200
    assert refusal(await service.chat(model=7), 400)["param"] == "model"


async def test_stream_headers_keep_proxies_from_holding_it_back():
    """No cache, no buffering."""
    response = await Service().chat(stream=True)
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize("stream", STREAMS)
async def test_record_of_a_finished_request_is_full(stream):
    """Tokens, times and reason of what was answered."""
    engine = FakeEngine(["a", Pause(0.01), "b"], finish_reason=FinishReason.LENGTH)
    service = Service(engine)
    response = await service.chat(stream=stream)
    (record,) = service.records
    assert record.request_id == response.headers["x-request-id"]
    assert (record.path, record.status, record.stream, record.model) == (CHAT, 200, stream, MODEL)
    assert (record.finish_reason, record.error_code) == ("length", None)
    assert (record.prompt_tokens, record.completion_tokens) == (5, 2)
    assert 0 < record.ttft_s < record.duration_s - 0.005


async def test_stream_text_equals_whole_text():
    """The same deltas, the same text."""
    engine = FakeEngine(["é", Pause(0.001), " 日", "本\n", Pause(0.001), "\u2028x"])
    service = Service(engine)
    whole = (await service.chat()).json()["choices"][0]["message"]["content"]
    chunks = events(await service.chat(stream=True))[:-1]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == whole


async def test_generation_leaves_nothing_of_a_hundred_disconnects():
    """Clients that leave at any moment: every engine slot is free, every request recorded."""
    service = Service(FakeEngine(["a", Pause(0.002), "b", Pause(0.002), "c"] * 3))
    before = len(asyncio.all_tasks())

    async def leave(after):
        connection = Connection(CHAT, json.dumps(HELLO | {"stream": after % 2 == 0}).encode())
        running = connection.run(service.app)
        await asyncio.sleep(after / 5000)
        connection.disconnect()
        await running

    await asyncio.gather(*(leave(after) for after in range(100)))
    assert not service.engine.running
    assert len(service.records) == 100
    assert len(asyncio.all_tasks()) == before
    assert {record.error_code for record in service.records} >= {"request_cancelled"}
