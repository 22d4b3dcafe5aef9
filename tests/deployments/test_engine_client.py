"""The Serve handle as an engine, over a scripted handle: what a lost replica costs."""

import asyncio
from dataclasses import replace

import pytest
from ray.exceptions import ActorDiedError
from structlog.testing import capture_logs

from serve_app.deployments import engine_client
from serve_app.deployments.engine_client import ANY_REPLICA, RemoteEngine, translate
from serve_app.deployments.frame_receiver import FrameReceiver
from serve_app.errors import EngineDead, EngineError, InvalidRequest, NotReady
from serve_app.protocol import (
    FinishReason,
    GenerationRequest,
    Heartbeat,
    SamplingParams,
    Structure,
    TextPrompt,
    TokenDelta,
    Usage,
)

REQUEST = GenerationRequest("r1", TextPrompt("Hello"))
STRUCTURED = replace(REQUEST, sampling=SamplingParams(structure=Structure("json_object")))
BEAT = Heartbeat()
FIRST = TokenDelta("a", (1,), Usage(1, 1))
LAST = TokenDelta("b", (2,), Usage(1, 2), FinishReason.LENGTH)


class Handle:
    """A deployment's handle whose replicas answer one course after the other."""

    def __init__(self, *courses):
        self.courses = list(courses)
        self.cancelled = 0
        self.generate = self
        self.sessions = []

    def options(self, **options):
        if options != {"stream": True}:
            self.sessions.append(options.pop("session_id"))
            assert not options
        return self

    def remote(self, request, reply_to):
        assert reply_to is None  # nobody listens: all comes over the call
        assert request in (REQUEST, STRUCTURED)
        return Deltas(self, self.courses.pop(0))


class Deltas:
    """One call: the items of a course, the exceptions among them raised."""

    def __init__(self, handle, course):
        self._handle, self._course = handle, iter(course)

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = next(self._course, None)
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, ActorDiedError):
            raise item
        if isinstance(item, float):
            await asyncio.sleep(item)
            return await anext(self)
        return item

    def cancel(self):
        self._handle.cancelled += 1


def remote(handle):
    return RemoteEngine(handle, FrameReceiver(), patience_s=0.2, stall_timeout_s=0.1)


async def taken(handle, request=REQUEST):
    """Return what a client gets, the error last."""
    came = []
    try:
        async for delta in remote(handle).generate(request):
            came.append(delta)  # noqa: PERF401 (what came before an error counts)
    except EngineError as error:
        came.append(type(error))
    return came


@pytest.mark.parametrize("loss", [ActorDiedError(), EngineDead("the engine stopped")])
async def test_engine_client_moves_a_request_of_a_replica_lost_before_its_first_token(loss):
    """The request goes to another replica, and the log says so."""
    handle = Handle([loss], [FIRST, LAST])
    with capture_logs() as logs:
        assert await taken(handle) == [FIRST, LAST]
    assert [line for line in logs if line["event"] == "request.moved"]
    assert (handle.courses, handle.cancelled) == ([], 0)
    assert handle.sessions == [ANY_REPLICA]  # not to the one that it would always choose


async def test_engine_client_does_not_begin_again_a_stream_that_has_begun():
    """Its client learns that it may ask again; no token comes twice."""
    handle = Handle([FIRST, ActorDiedError()], [FIRST, LAST])
    assert await taken(handle) == [FIRST, EngineDead]
    assert len(handle.courses) == 1


async def test_engine_client_moves_a_request_once():
    """Two lost replicas end it: a request that kills them does not go through them all."""
    handle = Handle([ActorDiedError()], [ActorDiedError()], [FIRST, LAST])
    assert await taken(handle) == [EngineDead]
    assert len(handle.courses) == 1


async def test_engine_client_does_not_count_a_stopped_engine_as_a_move(monkeypatch):
    """Its replica is met until it has ended, by a request with a structure as well."""
    monkeypatch.setattr(engine_client, "AGAIN_S", 0)
    stopped = EngineDead("the engine stopped", untouched=True)
    for request in (REQUEST, STRUCTURED):
        handle = Handle([stopped], [stopped], [stopped], [FIRST, LAST])
        assert await taken(handle, request) == [FIRST, LAST]
    handle = Handle([stopped], [ActorDiedError()], [stopped], [FIRST, LAST])
    assert await taken(handle) == [FIRST, LAST]
    monkeypatch.setattr(engine_client, "UNTOUCHED", 0)
    assert await taken(Handle([stopped], [stopped], [FIRST])) == [EngineDead]


async def test_engine_client_meets_a_stopped_engine_as_often_after_a_wait(monkeypatch):
    """How long a request stood in line before does not count."""
    monkeypatch.setattr(engine_client, "AGAIN_S", 0.001)
    monkeypatch.setattr(engine_client, "UNTOUCHED", 3)
    stopped = EngineDead("the engine stopped", untouched=True)
    handle = Handle([0.15, stopped], [0.15, stopped], [stopped], [FIRST, LAST])
    assert await taken(handle) == [FIRST, LAST]


class Asked:
    """A deployment's handle whose replicas answer one question after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.tokenize = self

    def options(self, **_options):
        return self

    async def remote(self, prompt):
        answer = self.answers.pop(0)
        if isinstance(answer, ActorDiedError):
            raise answer
        return answer


async def test_engine_client_asks_another_replica_for_tokens():
    """Once, whether it was lost or says that its engine stopped; a refusal is one."""
    for lost in (ActorDiedError(), EngineDead("the engine stopped")):
        assert await remote(Asked(lost, "ids")).tokenize(TextPrompt("x")) == "ids"
        with pytest.raises(EngineDead):
            await remote(Asked(lost, lost, "ids")).tokenize(TextPrompt("x"))
    with pytest.raises(InvalidRequest):
        await remote(Asked(InvalidRequest("no"), "ids")).tokenize(TextPrompt("x"))


async def test_engine_client_does_not_ask_again_after_a_refusal():
    """What one replica refuses, another would refuse."""
    handle = Handle([InvalidRequest("too long")], [FIRST, LAST])
    with pytest.raises(InvalidRequest):
        await taken(handle)
    assert len(handle.courses) == 1


def test_translate_does_not_log_what_an_exception_says():
    """It may quote a prompt; the client learns no more than that generation failed."""
    with capture_logs() as logs:
        error = translate(ValueError("a prompt of a client"), request_id="r1")
    assert type(error) is EngineError
    assert [line["cause"] for line in logs] == ["ValueError"]
    assert "prompt" not in f"{logs}{error.message}{error.details}"


async def test_engine_client_cancels_the_call_of_a_client_that_leaves():
    """Closing the iterator reaches the replica."""
    handle = Handle([FIRST, LAST])
    deltas = remote(handle).generate(REQUEST)
    assert await anext(deltas) == FIRST
    await deltas.aclose()
    assert handle.cancelled == 1


async def test_engine_client_does_not_move_what_has_a_structure():
    """Should it have ended the replica, it would end the next one."""
    handle = Handle([ActorDiedError()], [FIRST, LAST])
    assert await taken(handle, STRUCTURED) == [EngineDead]
    assert len(handle.courses) == 1


async def test_engine_client_has_a_limit_of_its_own_for_the_first_token():
    """A service that does not wake in time says so."""
    assert await taken(Handle([0.1, BEAT, FIRST, LAST])) == [FIRST, LAST]
    handle = Handle([9.0, FIRST, LAST])
    with pytest.raises(NotReady, match=r"within 0\.2 s"):
        await taken(handle)
    assert handle.cancelled == 1


async def test_engine_client_treats_a_silent_replica_as_lost():
    """In mid-stream it ends the stream; before the first token the request goes to another."""
    handle = Handle([BEAT, FIRST, BEAT, 9.0, LAST])
    assert await asyncio.wait_for(taken(handle), 2) == [FIRST, EngineDead]
    assert handle.cancelled == 1
    handle = Handle([BEAT, 9.0, FIRST], [BEAT, FIRST, LAST])
    assert await asyncio.wait_for(taken(handle), 2) == [FIRST, LAST]
    handle = Handle([BEAT, FIRST, *[0.06, BEAT] * 5, LAST])
    assert await taken(handle) == [FIRST, LAST]


async def test_remote_engine_patience():
    """Signs of life do not prolong what the first token may take; after it they alone count."""
    beats = [0.04, BEAT] * 20
    with pytest.raises(NotReady, match=r"within 0\.2 s"):
        await asyncio.wait_for(taken(Handle([*beats, FIRST])), 2)
    assert await taken(Handle([FIRST, *beats, LAST])) == [FIRST, LAST]


async def test_remote_engine_without_an_end(monkeypatch):
    """A call that is over before its completion is, is a lost replica."""
    monkeypatch.setattr(engine_client, "LAST_FRAME_S", 0.01)
    assert await taken(Handle([FIRST])) == [FIRST, EngineDead]
