"""One watch for all ingresses: who keeps it, what the others show, what happens when it ends."""

import asyncio
import time
from contextlib import asynccontextmanager, suppress

import pytest
from ray.exceptions import RayError

from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.cluster import kv
from serve_app.config import parse_args
from serve_app.deployments import jobs, shared_watch
from serve_app.deployments.shared_watch import LEASE_S, Lease, SharedWatch

COMMIT = "c" * 40
CONFIG = parse_args({"model": {"repo_id": "acme/tiny"}})


class Clock:
    """Seconds that a test moves on."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def verdict(outcome):
    node = NodeVerdict("id", "n1", outcome, "fix", commit=COMMIT)
    return Verdict("acme/tiny", "main", COMMIT, "http://hub", 0.5, (node,))


def leases(clock, *names):
    return [Lease("watch/llm", name, clock) for name in names]


def test_lease_has_one_holder(kv_store):
    """Whoever asks first, for as long as it asks again."""
    clock = Clock()
    first, second = leases(clock, "a", "b")
    for _ in range(20):
        assert (first.hold(), second.hold()) == (True, False)
        clock.now += LEASE_S / 2


def test_lease_runs_out(kv_store):
    """A process that died says nothing any more; one that only stood still has lost it."""
    clock = Clock()
    first, second, third = leases(clock, "a", "b", "c")
    assert (first.hold(), second.hold(), third.hold()) == (True, False, False)
    clock.now += LEASE_S + 1
    assert (second.hold(), third.hold()) == (True, False)
    assert first.hold() is False


def test_lease_release_hands_over_at_once(kv_store):
    """And never what another one holds."""
    clock = Clock()
    first, second = leases(clock, "a", "b")
    first.hold()
    second.hold()
    second.release()
    assert first.hold() is True
    first.release()
    assert (first.held, second.hold()) == (False, True)


def test_lease_without_a_store_changes_nothing(kv_store):
    """Neither two holders nor none."""
    clock = Clock()
    first, second = leases(clock, "a", "b")
    first.hold()
    second.hold()
    kv_store.is_lost = True
    clock.now += 5 * LEASE_S
    assert (first.hold(), second.hold()) == (True, False)
    kv_store.is_lost = False
    assert first.hold() is True


class Metrics:
    """What an ingress exports."""

    def __init__(self):
        self.shown = None

    def show(self, verdict):
        self.shown = verdict

    def forget(self):
        self.shown = None

    async def keep(self, living):
        await asyncio.Event().wait()


@pytest.fixture
def checks(monkeypatch, kv_store):
    """The rounds that were made, by what they find; every wait is short."""
    made, found = [], [Outcome.GRANTED]

    def recheck(application, config, commit):
        made.append(commit)
        return verdict(found[0])

    monkeypatch.setattr(shared_watch, "recheck", recheck)
    monkeypatch.setattr(shared_watch, "AccessMetrics", Metrics)
    monkeypatch.setattr(shared_watch, "LOOK_S", 0.01)
    monkeypatch.setattr(shared_watch, "LEASE_S", 0.15)
    return made, found


@asynccontextmanager
async def ingress(name, config=CONFIG):
    watch = SharedWatch("llm", config, verdict(Outcome.GRANTED), holder=name)
    task = asyncio.create_task(watch.run())
    await asyncio.sleep(0.05)
    try:
        yield watch
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def outcome(watch):
    return watch.snapshot()["nodes"][0]["outcome"]


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


async def test_shared_watch_is_kept_once(checks):
    """What one finds, all show; its metrics come from one alone."""
    made, found = checks
    async with ingress("a") as first, ingress("b") as second, ingress("c") as third:
        others = (second, third)
        assert made == []  # the gate has just asked
        found[0] = Outcome.LICENSE_NOT_ACCEPTED
        await first._watch.check()
        await until(lambda: {outcome(each) for each in others} == {"license_not_accepted"})
        assert [each.snapshot() for each in others] == [first.snapshot()] * 2
        assert made == [COMMIT]
        assert first._metrics.shown == verdict(Outcome.LICENSE_NOT_ACCEPTED)
        assert [each._metrics.shown for each in others] == [None, None]


async def test_shared_watch_is_taken_over(checks):
    """By one of the others, which asks at once; the one that comes back follows."""
    made, found = checks
    async with ingress("b") as second, ingress("c") as third:
        async with ingress("a") as newcomer:
            assert newcomer._metrics.shown is None
        found[0] = Outcome.EXPIRED_TOKEN
        second._lease.hold = lambda: False  # its event loop stands still
        await until(lambda: third._lease.held)
        await until(lambda: outcome(third) == "expired_token")
        await until(lambda: outcome(second) == "expired_token")
        assert made == [COMMIT]
        assert third._metrics.shown == verdict(Outcome.EXPIRED_TOKEN)
        assert second._metrics.shown is None


async def test_shared_watch_is_taken_over_once_while_the_hub_is_slow(checks, monkeypatch):
    """A check that takes longer than the lease lasts: no other ingress begins one beside it."""
    _, found = checks
    began = []

    def slow(application, config, commit):
        began.append(commit)
        time.sleep(0.6)  # of a thread
        return verdict(found[0])

    monkeypatch.setattr(shared_watch, "recheck", slow)
    async with ingress("a") as first, ingress("b") as second, ingress("c") as third:
        found[0] = Outcome.EXPIRED_TOKEN
        first._lease.hold = lambda: False
        await until(lambda: outcome(second) == outcome(third) == "expired_token")
        assert began == [COMMIT]


async def test_shared_watch_goes_on_after_an_error(checks, monkeypatch):
    """A round that Ray did not answer is no reason never to ask again."""
    made, found = checks
    monkeypatch.setattr(jobs, "PAUSE_S", 0.01)

    def fails_once(application, config, commit):
        made.append(commit)
        if len(made) == 1:
            raise RayError
        return verdict(found[0])

    monkeypatch.setattr(shared_watch, "recheck", fails_once)
    found[0] = Outcome.EXPIRED_TOKEN
    async with ingress("a") as first, ingress("b") as second:
        first._lease.hold = lambda: False
        await until(lambda: outcome(second) == "expired_token")
        assert second._lease.held
        assert made == [COMMIT] * 2


async def test_shared_watch_release(checks, monkeypatch):
    """An ingress that is scaled down leaves no gap."""
    monkeypatch.setattr(shared_watch, "LEASE_S", 900)
    async with ingress("a") as first:
        pass
    async with ingress("b") as second:
        assert not second._lease.held  # the first has ended without a word
    assert kv.keys("verdict/")
    first.release()
    assert kv.keys("verdict/") == kv.keys("watch/") == []
    async with ingress("c") as third:
        assert third._lease.held


async def test_shared_watch_is_of_one_version(checks):
    """While a rollout replaces ingresses, each version shows its own verdict."""
    other = parse_args({"model": {"repo_id": "acme/tiny", "served_name": "other"}})
    async with ingress("a") as old, ingress("b", other) as new:
        assert old._lease.held
        assert new._lease.held
