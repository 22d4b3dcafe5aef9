"""Deltas on their way from a replica to an ingress, over a real connection."""

import asyncio
import math
import random
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import pytest
from structlog.testing import capture_logs

from serve_app.deployments import engine_client, frame_receiver, frame_sender, frames
from serve_app.deployments.engine_client import RemoteEngine
from serve_app.deployments.frame_receiver import FrameReceiver
from serve_app.deployments.frame_sender import FrameSender
from serve_app.deployments.frames import Failure, Frame
from serve_app.deployments.server import LLMServer
from serve_app.errors import (
    ContextLengthExceeded,
    EngineDead,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    NotReady,
    Overloaded,
    ServeAppError,
)
from serve_app.protocol import (
    FinishReason,
    GenerationRequest,
    Heartbeat,
    Logprob,
    SamplingParams,
    TextPrompt,
    Timing,
    TokenDelta,
    TokenLogprobs,
    Usage,
)
from tests.certificates import make_certificates
from tests.fakes import FakeEngine, Pause

DELTA = TokenDelta("a", (1,), Usage(1, 1))
FULL = TokenDelta(
    "b\u2028\x00é",
    (1, 2),
    Usage(3, 4, 5),
    FinishReason.STOP,
    index=2,
    logprobs=(
        TokenLogprobs(Logprob(1, "�", b"\xe2\x80", -math.inf), (Logprob(2, "c", b"c", -0.1),)),
    ),
    prompt_logprobs=(TokenLogprobs(None),),
    timing=Timing(0.1, 1e-9, 3.0),
    reasoning="d",
    prompt_token_ids=(7, 8),
)


class Server(LLMServer):
    """A replica around a scripted engine."""

    def __init__(self, engine, heartbeat_s=0.05):
        self._engine = engine
        engine.check = lambda: None
        self._heartbeat_s = heartbeat_s
        self._frames = FrameSender(heartbeat_s)
        self._first_answer = asyncio.get_running_loop().create_future()

    def __del__(self):
        """Do nothing: `close` was called."""


class Handle:
    """A deployment's handle that runs a replica's method in this process.

    Args:
        *servers: replicas, asked in turns.
    """

    def __init__(self, *servers):
        self.servers = servers
        self.calls = []
        self.generate = self

    def options(self, **_options):
        return self

    def remote(self, request, reply_to):
        server = self.servers[len(self.calls) % len(self.servers)]
        self.calls.append(Call(server.generate(request, reply_to)))
        return self.calls[-1]


class Call:
    """One call, run by a task of its own as Serve does; what comes over it is counted."""

    def __init__(self, items):
        self.items, self.came = asyncio.Queue(), []
        self._task = asyncio.create_task(self._run(items))

    async def _run(self, items):
        try:
            async for item in items:
                self.came.append(item)
                await self.items.put(item)
        finally:
            self.items.put_nowait(None)

    def __aiter__(self):
        return self

    async def __anext__(self):
        item = await self.items.get()
        if item is None:
            raise StopAsyncIteration
        return item

    def cancel(self):
        self._task.cancel()


@asynccontextmanager
async def ingress(*engines, stall_timeout_s=30.0, patience_s=60.0):
    """Yield a `RemoteEngine` in front of replicas with these engines, and its handle."""
    receiver = FrameReceiver()
    await receiver.listen("127.0.0.1")
    servers = [Server(engine) for engine in engines]
    handle = Handle(*servers)
    try:
        yield (
            RemoteEngine(handle, receiver, patience_s=patience_s, stall_timeout_s=stall_timeout_s),
            handle,
        )
    finally:
        receiver.close()
        for server in servers:
            server._frames.close()
        await asyncio.sleep(0)


def connections(server):
    """Return a replica's connections to ingresses."""
    tasks = server._frames._connections.values()
    return [task.result() for task in tasks if task.done() and task.result()]


def cut(server):
    for connection in connections(server):
        connection._writer.transport.abort()


def asked(name="r", **changes):
    return replace(GenerationRequest(name, TextPrompt("Hello")), **changes)


async def came(engine, request):
    """Return what a client gets; an error is the last of it."""
    items = []
    try:
        async for delta in engine.generate(request):
            items.append(delta)  # noqa: PERF401 (what came before an error counts)
    except ServeAppError as error:
        items.append(error)
    return items


def test_encode_keeps_everything():
    """All fields, odd characters, bytes and infinities included."""
    failure = Failure.of(Overloaded("full", param="n", retry_after_s=2, untouched=True, share=0.5))
    frame = Frame([1, 2], [(1, DELTA), (2, FULL)], [(3, failure)])
    encoded = frames.encode(frame)
    assert frames.decode(encoded[4:]) == frame
    error = failure.error()
    assert (type(error), error.message, error.param) == (Overloaded, "full", "n")
    assert error.details == {"retry_after_s": 2, "untouched": True, "share": 0.5}


def test_failure_of_no_known_kind():
    """A name from a socket becomes no class but one of ours."""
    for kind in ("SystemExit", "annotations", "Callable", ""):
        assert type(Failure(kind, "m", None, {}).error()) is EngineError


def test_encode_an_unwritable_item_is_its_own_requests_error():
    """Half a surrogate pair, which a chat template can write, costs the others nothing."""
    refused = Failure("ContextLengthExceeded", "\ud800", None, {})
    odd = replace(DELTA, text="\ud800")
    encoded = frames.encode(Frame([1, 2, 3], [(1, DELTA), (2, odd), (1, FULL)], [(3, refused)]))
    whole = Frame()
    while encoded:
        length = 4 + int.from_bytes(encoded[:4])
        part, encoded = frames.decode(encoded[4:length]), encoded[length:]
        whole.taken += part.taken
        whole.deltas += part.deltas
        whole.failures += part.failures
    assert (whole.taken, whole.deltas) == ([1, 2, 3], [(1, DELTA), (1, FULL)])
    assert [(key, type(failure.error())) for key, failure in whole.failures] == [
        (2, EngineError),
        (3, EngineError),
    ]
    assert Failure.of(InvalidRequest("a\ud800b")).message == "a?b"


async def test_carry_deltas_in_order():
    """Of many requests at once, with nothing over Ray's stream."""
    words = [f"{number} " for number in range(20)]
    engine = FakeEngine([step for word in words for step in (Pause(0), word)])
    async with ingress(engine) as (remote, handle):
        answers = await asyncio.gather(*(came(remote, asked(f"r{n}", n=2)) for n in range(8)))
    for answer in answers:
        for index in (0, 1):
            own = [delta for delta in answer if delta.index == index]
            assert [delta.text for delta in own] == words
            assert own[-1].finish_reason is FinishReason.STOP
    assert [call.came for call in handle.calls] == [[]] * 8


@pytest.mark.parametrize("way", ["frames", "the call"])
async def test_carry_a_long_prompts_probabilities_in_parts(way, monkeypatch):
    """Whole for who asked; no frame, and no item over Ray, keeps an event loop for long."""
    sizes = []
    decode = frames.decode
    monkeypatch.setattr(frames, "decode", lambda body: sizes.append(len(body)) or decode(body))
    engine = FakeEngine(["a", "b"], prompt_tokens=4000)
    request = replace(asked(), sampling=SamplingParams(prompt_logprobs=20))
    async with ingress(engine) as (remote, handle):
        if way == "the call":
            remote._receiver._address = None
        first, last = await came(remote, request)
    assert first.prompt_logprobs == engine._prompt_logprobs(request)
    assert (first.text, last.text, last.prompt_logprobs) == ("a", "b", ())
    parts = [item for item in handle.calls[0].came if isinstance(item, TokenDelta)]
    if way == "frames":
        assert len(sizes) > 20
        assert max(sizes) < 600_000
        assert not parts
    else:
        assert len(parts) > 20
        assert max(len(part.prompt_logprobs) for part in parts) == 4096 // 21


async def test_carry_one_frame_a_turn(monkeypatch):
    """What many requests have at the same time is one message."""
    tick = asyncio.Event()
    written = []
    encode = frames.encode
    monkeypatch.setattr(frames, "encode", lambda frame: written.append(frame) or encode(frame))

    class Ticking(FakeEngine):
        async def generate(self, request):
            await tick.wait()
            yield replace(DELTA, finish_reason=FinishReason.LENGTH)

    async with ingress(Ticking()) as (remote, _):
        reading = [asyncio.create_task(came(remote, asked(f"r{n}"))) for n in range(32)]
        await asyncio.sleep(0.2)
        tick.set()
        await asyncio.gather(*reading)
    assert [len(frame.deltas) for frame in written if frame.deltas] == [32]


@pytest.mark.parametrize("begun", [False, True])
async def test_carry_errors(begun):
    """Our own arrive as they are, after what came before them."""
    error = ContextLengthExceeded("too long", param="messages", limit=5)
    async with ingress(FakeEngine([*["a"] * begun, error])) as (remote, _):
        *before, last = await came(remote, asked())
    assert [delta.text for delta in before] == ["a"] * begun
    assert (type(last), last.message, last.param) == (type(error), "too long", "messages")


async def test_remote_engine_cancels():
    """A client that leaves frees its request, and its neighbour goes on."""
    engine = FakeEngine(["a", Pause(0.3), "b"])
    async with ingress(engine) as (remote, _):
        neighbour = asyncio.create_task(came(remote, asked("stays")))
        deltas = remote.generate(asked("leaves"))
        await anext(deltas)
        await deltas.aclose()
        for _ in range(5):
            await asyncio.sleep(0)
        assert engine.closed_early == ["leaves"]
        assert [delta.text for delta in await neighbour] == ["a", "b"]


@pytest.mark.timed
async def test_remote_engine_waits_for_a_silent_engine():
    """Empty frames are signs of life while there is no delta."""
    engine = FakeEngine(["a", Pause(1.2), "b"])
    async with ingress(engine, stall_timeout_s=0.6) as (remote, _):
        assert [delta.text for delta in await came(remote, asked())] == ["a", "b"]


@pytest.mark.timed
async def test_remote_engine_gives_a_silent_replica_up(monkeypatch):
    """A replica whose process stands still sends no frames; the request ends in time."""
    monkeypatch.setattr(frame_sender.Connection, "_flush", lambda self: None)
    async with ingress(FakeEngine(), patience_s=0.3) as (remote, _):
        (error,) = await came(remote, asked())
    assert isinstance(error, NotReady)  # it never said that it has the request
    monkeypatch.undo()
    flush, frames_left = frame_sender.Connection._flush, iter(range(2))

    def few(self):
        if next(frames_left, None) is not None:
            flush(self)

    monkeypatch.setattr(frame_sender.Connection, "_flush", few)
    engine = FakeEngine(["a", Pause(0.05), "b", Pause(), "c"])
    async with ingress(engine, stall_timeout_s=0.2) as (remote, _):
        *before, error = await asyncio.wait_for(came(remote, asked()), 2)
    assert [delta.text for delta in before] in (["a"], ["a", "b"])
    assert isinstance(error, EngineDead)
    assert error.details["cause"] == "stalled"


async def test_connection_lost_ends_its_requests(monkeypatch):
    """At both ends: the client has an error or moves on, the engine is free."""
    engine = FakeEngine(["a", Pause(), "b"])
    async with ingress(engine, FakeEngine(["c"])) as (remote, handle):
        begun = asyncio.create_task(came(remote, asked("begun")))
        await asyncio.sleep(0.1)
        (connection,) = connections(handle.servers[0])
        connection._writer.transport.abort()
        first, error = await asyncio.wait_for(begun, 2)
        assert first.text == "a"
        assert isinstance(error, EngineDead)
        await asyncio.sleep(0.05)
        assert engine.closed_early == ["begun"]
        # The next one connects again.
        assert [delta.text for delta in await came(remote, asked("next"))] == ["c"]


async def test_connection_lost_before_a_token_moves_the_request():
    """Nothing was lost for the client yet."""
    engine = FakeEngine([Pause(), "a"])
    async with ingress(engine, FakeEngine(["b"])) as (remote, handle):
        answer = asyncio.create_task(came(remote, asked()))
        await asyncio.sleep(0.1)
        (connection,) = connections(handle.servers[0])
        connection.close()
        assert [delta.text for delta in await asyncio.wait_for(answer, 2)] == ["b"]


async def test_remote_engine_adapter_that_a_replica_lacks(monkeypatch):
    """During a rollout there are replicas of two versions; the ingress knows its own's adapters."""
    monkeypatch.setattr(engine_client, "AGAIN_S", 0.001)
    unknown = ModelNotFound("this replica has no such adapter", param="model")
    async with ingress(FakeEngine([unknown]), FakeEngine(["a"])) as (remote, handle):
        for number in range(3):
            (delta,) = await came(remote, asked(f"r{number}", adapter="new"))
            assert delta.text == "a"
        assert len(handle.calls) == 6
    async with ingress(FakeEngine([unknown])) as (remote, _):
        (error,) = await came(remote, asked(adapter="new"))
        assert isinstance(error, NotReady)
        assert "new" in error.message


async def test_remote_engine_call_that_fails_by_itself(monkeypatch):
    """Whatever a call raises, the request ends, and with no word of it."""

    async def fails(_):
        raise RuntimeError("the prompt")

    monkeypatch.setattr(Call, "__anext__", fails)
    async with ingress(FakeEngine([Pause()])) as (remote, _):
        with capture_logs() as logs:
            (error,) = await asyncio.wait_for(came(remote, asked()), 2)
    assert (type(error), error.message) == (EngineError, "generation failed")
    assert [line["event"] for line in logs] == ["request.failed"]
    assert "the prompt" not in str(logs)


async def answered_over_the_call(receiver):
    """Ask three times where no frame can come; returns the log, which says so once."""
    handle = Handle(Server(FakeEngine(["a", "b"])))
    remote = RemoteEngine(handle, receiver, patience_s=60, stall_timeout_s=60)
    with capture_logs() as logs:
        for _ in range(3):
            assert [delta.text for delta in await came(remote, asked())] == ["a", "b"]
    assert [line["event"] for line in logs] == ["frames.unreachable"]
    return logs


async def test_sender_unreachable_ingress_is_answered_over_the_call(monkeypatch):
    """A firewall between nodes costs speed and no request."""
    receiver = FrameReceiver()
    receiver._address = ("127.0.0.1", 9)  # nobody listens on it
    logs = await answered_over_the_call(receiver)
    assert receiver._secret not in str(logs)


@pytest.mark.parametrize("way", ["accepted and cut off", "too many strangers", "another secret"])
async def test_sender_without_a_welcome_answers_over_the_call(way, monkeypatch):
    """A port that only accepts is no way: a proxy's, or that of an ingress which knows nobody."""
    receiver = FrameReceiver()
    await receiver.listen("127.0.0.1")
    accepting = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    if way == "accepted and cut off":
        receiver._address = accepting.sockets[0].getsockname()
    elif way == "too many strangers":
        monkeypatch.setattr(frame_receiver, "MAX_STRANGERS", 0)
    else:
        hello = frames.hello
        monkeypatch.setattr(frames, "hello", lambda secret: hello(secret[::-1]))
    await answered_over_the_call(receiver)
    accepting.close()
    receiver.close()


async def test_receiver_that_cannot_listen_says_so():
    """Requests are answered over Ray's streams then."""
    receiver = FrameReceiver()
    with capture_logs() as logs:
        await receiver.listen("192.0.2.1")  # of no machine (RFC 5737)
    assert [line["event"] for line in logs] == ["frames.not_listening"]
    with receiver.open() as inbox:
        assert inbox.reply_to is None


async def test_receiver_with_certificates(tmp_path, monkeypatch):
    """Where Ray's nodes have certificates, so has this: both ends, of the same authority."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    ours, other = (make_certificates(tmp_path / name) for name in ("a", "b"))

    def use(certificates):
        monkeypatch.setenv("RAY_USE_TLS", "1")
        monkeypatch.setenv("RAY_TLS_SERVER_CERT", str(certificates.server[0]))
        monkeypatch.setenv("RAY_TLS_SERVER_KEY", str(certificates.server[1]))
        monkeypatch.setenv("RAY_TLS_CA_CERT", str(certificates.authority))

    use(ours)
    async with ingress(FakeEngine(["a", "b"]), FakeEngine(["c"])) as (remote, handle):
        assert [delta.text for delta in await came(remote, asked())] == ["a", "b"]
        assert handle.calls[0].came == []
        use(other)  # not one of the cluster's nodes
        assert [delta.text for delta in await came(remote, asked())] == ["c"]
        assert [type(item) for item in handle.calls[1].came] == [Heartbeat, TokenDelta]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"GET / HTTP/1.1\r\n\r\n",
        frames.hello("no secret"),
        b"\xff\xff\xff\xff",
        frames.hello("é" * 64),
    ],
)
async def test_receiver_ends_a_strangers_connection(said, monkeypatch):
    """Without the secret a connection ends, whatever comes behind it."""
    monkeypatch.setattr(frame_receiver, "HELLO_TIMEOUT_S", 0.1)
    receiver = FrameReceiver()
    await receiver.listen("127.0.0.1")
    with receiver.open() as inbox:
        reader, writer = await asyncio.open_connection(*receiver._address)
        forged = frames.encode(Frame([inbox.reply_to.key], [(inbox.reply_to.key, DELTA)]))
        writer.write(said + forged if said else b"")
        assert await asyncio.wait_for(reader.read(), 2) == b""
        assert await inbox.get(0.05) is None
        writer.close()
    receiver.close()


async def test_receiver_ends_a_broken_connection():
    """And is logged, without what it held."""
    receiver = FrameReceiver()
    await receiver.listen("127.0.0.1")
    with receiver.open() as inbox, capture_logs() as logs:
        reader, writer = await asyncio.open_connection(*receiver._address)
        taken = frames.encode(Frame([inbox.reply_to.key]))
        writer.write(frames.hello(inbox.reply_to.secret) + taken + b"\0\0\0\x08[prompt]")
        assert await asyncio.wait_for(reader.read(), 2) == frames.WELCOME
        assert inbox.taken
        assert isinstance(await inbox.get(0.05), EngineDead)
    receiver.close()
    assert [line["event"] for line in logs] == ["frames.broken"]
    assert "prompt" not in str(logs)


def test_reply_to_keeps_its_secret():
    """It goes over Ray and into no log."""
    assert "hidden" not in repr(frames.ReplyTo("127.0.0.1", 1, "hidden"))


async def test_carry_holds_the_streams_of_a_slow_ingress_back(monkeypatch):
    """What is on its way is bounded; nothing is lost."""
    monkeypatch.setattr(frame_sender, "FULL_BYTES", 1 << 16)
    text = "x" * 65_536
    engine = FakeEngine([step for _ in range(200) for step in (Pause(0), text)])
    gate = asyncio.Event()
    read = frames.read

    async def held(reader, **limits):
        if not limits:
            await gate.wait()
        return await read(reader, **limits)

    monkeypatch.setattr(frames, "read", held)
    async with ingress(engine, stall_timeout_s=5) as (remote, handle):
        answer = asyncio.create_task(came(remote, asked()))
        await asyncio.sleep(0.5)
        (connection,) = connections(handle.servers[0])
        waiting = connection._writer.transport.get_write_buffer_size()
        assert 0 < waiting < 1 << 20
        gate.set()
        assert [delta.text for delta in await asyncio.wait_for(answer, 10)] == [text] * 200


def ends(item):
    return isinstance(item, ServeAppError) or item.finish_reason is not None


async def test_remote_engine_ends_every_request_once():
    """Clients that leave, refusals, failures and lost connections, by chance, at once."""
    chance = random.Random(7)

    def script(request):
        kind = chance.randrange(4)
        if kind == 0:
            return [Overloaded("full", retry_after_s=1)]
        if kind == 1:
            return ["a", Pause(chance.random() / 20), EngineError("failed")]
        return [step for _ in range(5) for step in ("a", Pause(chance.random() / 50))] + ["b"]

    engines = [FakeEngine(script) for _ in range(3)]
    async with ingress(*engines) as (remote, handle):

        async def client(number):
            patience_s = chance.choice([chance.random() / 30, 60, 60, 60])
            with suppress(TimeoutError):
                answer = await asyncio.wait_for(came(remote, asked(f"{number}")), patience_s)
                assert list(map(ends, answer)) == [*[False] * (len(answer) - 1), True]

        async def breaker():
            for server in chance.choices(handle.servers, k=6):
                await asyncio.sleep(0.05)
                cut(server)

        async with asyncio.TaskGroup() as group:
            for number in range(150):
                group.create_task(client(number))
            group.create_task(breaker())
        await asyncio.sleep(0.2)
        assert [engine.running for engine in engines] == [set()] * 3
        assert not remote._receiver._inboxes


async def test_remote_engine_waits_for_the_last_frame(monkeypatch):
    """Ray's end of a call overtakes the connection's last frame."""
    flush = frame_sender.Connection._flush
    later = lambda self: self._loop.call_later(0.1, flush, self)  # noqa: E731
    monkeypatch.setattr(frame_sender.Connection, "_flush", later)
    async with ingress(FakeEngine(["a", "b"])) as (remote, _):
        assert [delta.text for delta in await came(remote, asked())] == ["a", "b"]
    assert engine_client.LAST_FRAME_S >= 1
