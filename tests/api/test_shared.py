"""One computation for all who ask at the same time."""

import asyncio

import pytest

from serve_app.api.shared import Shared
from tests.api.harness import Service
from tests.fakes import FakeEngine, Pause


class Counted:
    """A computation that counts how often it ran."""

    def __init__(self, error=None):
        self.ran, self.error = 0, error

    async def __call__(self):
        self.ran += 1
        await asyncio.sleep(0.05)
        if self.error:
            raise self.error
        return self.ran


async def test_shared_is_one_for_all_who_ask_at_once():
    """And who asks later has a new one."""
    compute = Counted()
    shared = Shared(compute)
    assert await asyncio.gather(*(shared.get() for _ in range(500))) == [1] * 500
    assert await shared.get() == 2


async def test_shared_stays_fresh():
    """For as long as it is said to."""
    compute = Counted()
    shared = Shared(compute, fresh_s=0.2)
    assert [await shared.get(), await shared.get()] == [1, 1]
    await asyncio.sleep(0.25)
    assert await shared.get() == 2


async def test_shared_does_not_end_for_the_others_when_one_leaves():
    """A client that goes away cancels its own request alone."""
    compute = Counted()
    shared = Shared(compute)
    first, second = (asyncio.create_task(shared.get()) for _ in range(2))
    await asyncio.sleep(0.01)
    first.cancel()
    assert await second == 1
    assert first.cancelled()


async def test_shared_gives_an_error_to_everybody_and_does_not_keep_it():
    """The next who asks has another try."""
    compute = Counted(ValueError("no"))
    shared = Shared(compute, fresh_s=60)
    for tries in (1, 2):
        results = await asyncio.gather(*(shared.get() for _ in range(3)), return_exceptions=True)
        assert [type(result) for result in results] == [ValueError] * 3
        assert compute.ran == tries


async def test_ready_asks_the_replicas_once_for_many_probes(monkeypatch):
    """Five hundred at the same time on each page."""
    engine = FakeEngine(is_ready=Pause(0.05))
    asked = {"ready": 0, "metrics": 0, "access": 0}
    ready = engine.ready

    async def count_ready():
        asked["ready"] += 1
        return await ready()

    async def page():
        asked["metrics"] += 1
        await asyncio.sleep(0.05)
        return "up 1\n"

    def verdict():
        asked["access"] += 1
        return {"approved": True}

    monkeypatch.setattr(engine, "ready", count_ready)
    service = Service(engine, metrics=page, access=verdict)
    for path in ("/ready", "/metrics", "/access"):
        answers = await asyncio.gather(*(service.request("GET", path) for _ in range(100)))
        assert {answer.status_code for answer in answers} == {200}
    assert asked == {"ready": 1, "metrics": 1, "access": 1}


@pytest.mark.parametrize("is_ready", [False, ValueError("no")])
async def test_ready_does_not_stay_failed(is_ready):
    """Each time is a new question."""
    engine = FakeEngine(is_ready=is_ready)
    service = Service(engine)
    assert (await service.request("GET", "/ready")).status_code >= 500
    engine.is_ready = True
    assert (await service.request("GET", "/ready")).status_code == 200
