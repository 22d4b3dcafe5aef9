"""Two versions behind one ingress: who answers, who counts, and what a client notices."""

import asyncio
from dataclasses import replace

import pytest
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_app.cluster import kv
from serve_app.deployments import canary as store
from serve_app.deployments import jobs, split
from serve_app.deployments.canary import Canary
from serve_app.deployments.split import Split, place, sticky_key
from serve_app.errors import (
    ContextLengthExceeded,
    EngineDead,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestCancelled,
)
from serve_app.protocol import ChatPrompt, GenerationRequest, TextPrompt, TokenPrompt
from tests.fakes import FakeEngine, Pause

HALF = Canary("llm-canary", "trial-1", step=1, share=0.5)


class Counted:
    """What the metrics show."""

    def __init__(self):
        self.firsts, self.ends, self.shares = [], [], []

    def first_token(self, track, seconds):
        self.firsts.append(track)

    def ended(self, track, outcome):
        self.ends.append((track, outcome))

    def share(self, share):
        self.shares.append(share)


class Bench:
    """An ingress of `llm` with two scripted versions; by chance the new one answers."""

    def __init__(self, stable=("old",), tried=("new",), chance=None):
        self.stable, self.tried = FakeEngine(stable), FakeEngine(tried)
        self.connected = []
        self.metrics = Counted()
        self.chance = chance or (lambda: 0.0)
        self.split = Split(
            self.stable,
            self.connect,
            application="llm",
            ingress="ingress-1",
            metrics=self.metrics,
            chance=self.draw,
        )

    def draw(self):
        return self.chance()

    async def connect(self, canary):
        self.connected.append(canary.trial)
        return self.tried

    async def answer(self, **changes):
        """Ask once; returns the text."""
        number = len(self.stable.requests) + len(self.tried.requests)
        asked = replace(GenerationRequest(f"r{number}", TextPrompt("Hello")), **changes)
        return "".join([delta.text async for delta in self.split.generate(asked)])

    async def seen(self):
        """Return what the ingress says that it has seen: of the old version and the new one."""
        await self.split.look()
        report = store.report("llm", store.read("llm"))
        assert report.ingresses == 1
        return report.stable, report.canary


@pytest.fixture
async def bench(kv_store):
    """An ingress that knows a canary with half of the requests."""
    store.write("llm", HALF)
    bench = Bench()
    await bench.split.look()
    return bench


async def test_split_hands_the_engines_own_stream_out_without_a_canary(kv_store):
    """The engine's own iterator is handed out, and nothing is published."""
    bench = Bench()
    await bench.split.look()
    handed_out = bench.stable.generate(GenerationRequest("r", TextPrompt("Hello")))
    bench.stable.generate = lambda _: handed_out
    assert bench.split.generate(GenerationRequest("r", TextPrompt("Hello"))) is handed_out
    assert list(kv_store.held) == []
    assert bench.metrics.ends == []


async def test_split_gives_the_canary_its_share(bench):
    """Each version is counted for itself, in what the command reads and in the metrics."""
    draws = iter([0.1, 0.9])
    bench.chance = lambda: next(draws)
    assert [await bench.answer(), await bench.answer()] == ["new", "old"]
    stable, tried = await bench.seen()
    assert (stable.requests, tried.requests) == (1, 1)
    assert (stable.failed, tried.failed) == (0, 0)
    assert bench.metrics.ends == [("canary", "ok"), ("stable", "ok")]
    assert bench.metrics.firsts == ["canary", "stable"]
    assert bench.metrics.shares[-1] == 0.5


async def test_split_share_that_cannot_be_read(bench, kv_store, monkeypatch):
    """What another version wrote there, say: the one that serves answers, until it can be read."""
    monkeypatch.setattr(split, "LOOK_S", 0.001)
    monkeypatch.setattr(jobs, "PAUSE_S", 0.001)
    assert await bench.answer() == "new"
    kv.put(f"{store.SHARES}llm", '{"share": 1}')
    following = asyncio.create_task(jobs.keep_running(bench.split.run, "canary"))
    await asyncio.sleep(0.1)
    assert await bench.answer() == "old"
    assert bench.metrics.shares[-1] == 0.0
    store.write("llm", HALF)
    await asyncio.sleep(0.1)
    assert await bench.answer() == "new"
    following.cancel()


async def test_split_follows_the_command(bench):
    """What was seen in an earlier step does not count; at 0 the canary gets nothing more."""
    assert await bench.answer() == "new"
    store.write("llm", replace(HALF, step=2, share=0.75))
    assert (await bench.seen())[1].requests == 0
    assert bench.connected == ["trial-1"], "connected again for a step of the same canary"
    store.write("llm", replace(HALF, step=3, share=0.0))
    await bench.split.look()
    assert await bench.answer() == "old"
    assert bench.metrics.shares[-1] == 0.0
    store.write("llm", replace(HALF, trial="trial-2"))
    await bench.split.look()
    assert await bench.answer() == "new"
    assert bench.connected == ["trial-1", "trial-2"]
    store.forget("llm")
    await bench.split.look()
    assert await bench.answer() == "old"


@pytest.mark.parametrize("error", [EngineDead("lost"), NotReady("late"), Overloaded("full")])
async def test_split_lets_the_other_version_answer_what_the_canary_fails(bench, error):
    """It is the canary's error and nobody's else."""
    bench.tried.script = (error,)
    assert await bench.answer() == "old"
    stable, tried = await bench.seen()
    assert (tried.failed, tried.unanswered, tried.requests) == (1, 1, 1)
    assert (stable.failed, stable.requests) == (0, 1)
    assert ("canary", "error") in bench.metrics.ends


async def test_split_ends_a_stream_that_the_canary_has_begun(bench):
    """No token comes twice; the error counts."""
    bench.tried.script = ("new", EngineDead("lost"))
    with pytest.raises(EngineDead):
        await bench.answer()
    _, tried = await bench.seen()
    assert (tried.failed, tried.unanswered, tried.requests) == (1, 0, 1)
    assert bench.stable.requests == []


async def test_split_counts_a_refusal_of_what_the_other_version_takes(bench):
    """A smaller window is an error of the new version; nonsense is one of the client."""
    bench.tried.script = (ContextLengthExceeded("too long"),)
    assert await bench.answer() == "old"
    assert (await bench.seen())[1].failed == 1
    bench.stable.script = (InvalidRequest("nonsense"),)
    with pytest.raises(InvalidRequest):
        await bench.answer()
    stable, tried = await bench.seen()
    assert (stable.failed, stable.requests, tried.failed) == (0, 1, 1)


async def test_split_counts_no_cancelled_request(bench):
    """Nor is it asked again."""
    bench.tried.script = (RequestCancelled("gone"),)
    with pytest.raises(RequestCancelled):
        await bench.answer()
    assert (await bench.seen())[1].requests == 0
    assert bench.stable.requests == []


async def test_track_sees_who_waits_for_a_first_token(bench):
    """Else a canary that answers nobody would look like one that nobody asks."""
    bench.tried.script = (Pause(),)
    asking = asyncio.create_task(bench.answer())
    await asyncio.sleep(0.05)
    _, tried = await bench.seen()
    assert tried.waiting.over(0.04) == 1
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    (_, left), _ = await bench.seen(), await asyncio.sleep(0.05)
    _, tried = await bench.seen()
    assert tried.waiting.count == 1, "who has left has waited"
    assert tried.waiting.buckets == left.waiting.buckets, "and waits no longer"
    assert bench.tried.closed_early == ["r0"]


async def test_track_counts_a_reader_that_stops_at_the_last_token(bench):
    """The API closes the stream there."""
    bench.tried.script = ("a", "b", "c")
    deltas = bench.split.generate(GenerationRequest("r", TextPrompt("Hello"), n=2))
    ends = 0
    async for delta in deltas:
        ends += delta.finish_reason is not None
        if ends == 2:
            break
    await deltas.aclose()
    _, tried = await bench.seen()
    assert (tried.token.count, tried.failed, tried.waiting.count) == (1, 0, 0)
    assert bench.metrics.ends == [("canary", "ok")]


async def test_split_gives_nothing_to_a_canary_that_is_not_ready(kv_store):
    """The command sees why there are no requests."""
    store.write("llm", HALF)
    bench = Bench()
    bench.tried.is_ready = False
    await bench.split.look()
    assert await bench.answer() == "old"
    assert store.report("llm", HALF).unready == 1
    bench.tried.is_ready = True
    await bench.split.look()
    assert await bench.answer() == "new"
    assert store.report("llm", HALF).unready == 0


async def test_split_keeps_adapters_that_the_canary_lacks(kv_store):
    """It would refuse the request."""
    store.write("llm", replace(HALF, adapters=("legal",)))
    bench = Bench()
    await bench.split.look()
    assert await bench.answer(adapter="legal") == "new"
    assert await bench.answer(adapter="medical") == "old"


async def test_split_without_its_canary_goes_on(kv_store, monkeypatch):
    """Somebody took it away past the command: the share of it goes to the version that serves."""
    store.write("llm", HALF)
    bench = Bench()

    async def nobody(canary):
        raise RayServeException("no llm-canary serves")

    bench.split._connect = nobody
    with pytest.raises(RayServeException):
        await bench.split.look()
    assert await bench.answer() == "old"
    monkeypatch.setattr(split, "LOOK_S", 0.001)
    kv_store.is_lost = True
    following = asyncio.create_task(bench.split.run())
    await asyncio.sleep(0.02)
    bench.split._connect = bench.connect
    kv_store.is_lost = False
    async with asyncio.timeout(5):
        while not bench.connected:
            await asyncio.sleep(0.01)
    following.cancel()


async def test_split_keeps_the_share_while_the_store_does_not_answer(bench, kv_store):
    """A head that restarts changes nothing."""
    kv_store.is_lost = True
    with pytest.raises(RayError):
        await bench.split.look()
    assert await bench.answer() == "new"


def chat(*messages, client="me"):
    named = tuple({"role": role, "content": content} for role, content in messages)
    return GenerationRequest("r", ChatPrompt(named), client=client)


def test_sticky_key_of_a_conversation():
    """What grows behind its first question stays one conversation; another question is another."""
    first = chat(("system", "Be kind."), ("user", "Hello"))
    later = chat(("system", "Be kind."), ("user", "Hello"), ("assistant", "Hi"), ("user", "And?"))
    other = chat(("system", "Be kind."), ("user", "Good day"))
    keys = [sticky_key("conversation", each) for each in (first, later, other)]
    assert keys[0] == keys[1] != keys[2]
    assert sticky_key("conversation", replace(first, client="you")) != keys[0]
    long = "word " * 100
    for prompt, more in (
        (TextPrompt(long), TextPrompt(long + "more")),
        (TokenPrompt(tuple(range(300))), TokenPrompt(tuple(range(400)))),
    ):
        one, two = (sticky_key("conversation", GenerationRequest("r", p)) for p in (prompt, more))
        assert one == two
    assert sticky_key("conversation", chat()) is not None


def test_sticky_key_of_a_client():
    """Whatever is asked."""
    assert sticky_key("client", chat(client="me")) == "me"
    assert sticky_key("", chat(client="me")) is None


def test_place_is_even_and_keeps_who_has_come():
    """A tenth of the keys is below a tenth, other ones for each canary; a larger share adds."""
    keys = [f"client {number}" for number in range(4000)]
    early = {key for key in keys if place("one", key) < 0.1}
    assert 320 < len(early) < 480
    assert early < {key for key in keys if place("one", key) < 0.5}
    assert len(early & {key for key in keys if place("two", key) < 0.1}) < 100


async def test_split_lets_a_conversation_meet_one_version(kv_store):
    """Without chance."""
    store.write("llm", replace(HALF, sticky="conversation"))
    bench = Bench(chance=lambda: pytest.fail("drawn"))
    await bench.split.look()
    words = {}
    for number in range(20):
        prompt = TextPrompt(f"conversation {number}")
        words[number] = {await bench.answer(prompt=prompt) for _ in range(3)}
    assert {len(each) for each in words.values()} == {1}
    assert {word for each in words.values() for word in each} == {"old", "new"}


@pytest.fixture
async def shadowed(kv_store):
    """An ingress that copies every request to a canary which answers nobody."""
    store.write("llm", Canary("llm-canary", "trial-1", step=1, shadow=1.0))
    bench = Bench(chance=lambda: 0.5)
    await bench.split.look()
    return bench


async def copies_end(bench):
    async with asyncio.timeout(5):
        while bench.split._copies:
            await asyncio.sleep(0.001)


async def test_copy_is_answered_to_nobody(shadowed):
    """Under an id of their own, and counted."""
    assert await shadowed.answer() == "old"
    await copies_end(shadowed)
    stable, tried = await shadowed.seen()
    assert (stable.requests, tried.requests) == (1, 1)
    assert [request.request_id for request in shadowed.tried.requests] == ["r0-shadow"]


@pytest.mark.parametrize(
    ("error", "failed", "dropped"),
    [
        (EngineDead("lost"), 1, 0),
        (ContextLengthExceeded("too long"), 1, 0),  # which the other version has answered
        (Overloaded("full"), 0, 1),
    ],
)
async def test_copy_that_fails_is_seen_and_not_heard(shadowed, error, failed, dropped):
    """A canary that has no room for copies has not failed."""
    shadowed.tried.script = (error,)
    assert await shadowed.answer() == "old"
    await copies_end(shadowed)
    _, tried = await shadowed.seen()
    assert (tried.failed, tried.unanswered, tried.dropped) == (failed, failed, dropped)


async def test_copy_of_what_is_refused_is_not_made(shadowed):
    """Nonsense costs the canary nothing."""
    shadowed.stable.script = (InvalidRequest("nonsense"),)
    with pytest.raises(InvalidRequest):
        await shadowed.answer()
    assert shadowed.tried.requests == []


async def test_copy_is_left_out_when_too_many_run(shadowed):
    """A canary that answers nothing holds so many of them, and the rest is left out."""
    shadowed.tried.script = (Pause(),)
    for _ in range(split.COPIES + 3):
        assert await shadowed.answer() == "old"
    await asyncio.sleep(0)
    assert len(shadowed.tried.running) == split.COPIES
    assert (await shadowed.seen())[1].dropped == 3
    for copy in shadowed.split._copies:
        copy.cancel()
