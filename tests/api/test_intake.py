"""Bodies that come slowly, in great numbers, or not at all."""

import asyncio
import json
import time

import pytest
from starlette.datastructures import Headers

import serve_app.api.intake as intake_module
from serve_app.api.intake import Intake
from serve_app.errors import BodyTimeout, Overloaded, RequestTooLarge
from tests.api.harness import CHAT, HELLO, Connection, Service, until

SLOW = {"body_timeout_s": 0.2}


class Arriving:
    """One body that is fed by hand."""

    def __init__(self, intake, *, length=None):
        self.connection = Connection("/")
        headers = {} if length is None else {"content-length": str(length)}
        self.task = asyncio.create_task(self._read(intake, Headers(headers)))
        self.feed = self.connection.feed

    async def _read(self, intake, headers):
        async with intake.body(self.connection.incoming.get, headers) as raw:
            return raw


async def test_intake_answers_a_body_that_does_not_come_with_a_408():
    """In the envelope, with a word to close: the rest of it must not be read as a request."""
    service = Service(**SLOW)
    connection = Connection(CHAT)
    connection.feed(b"{", more=True)
    await asyncio.wait_for(connection.run(service.app), 5)
    assert connection.status == 408
    error = json.loads(connection.body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "request_timeout")
    assert (b"connection", b"close") in connection.sent[0]["headers"]
    assert [record.error_code for record in service.records] == ["request_timeout"]
    assert not service.engine.requests


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/completions", "/tokenize", "/detokenize"])
async def test_intake_limit_holds_on_every_path_with_a_body(path):
    """Also where no model is asked."""
    connection = Connection(path)
    await asyncio.wait_for(connection.run(Service(**SLOW).app), 5)
    assert connection.status == 408


async def test_intake_is_not_kept_up_by_a_byte_now_and_then():
    """What counts is the time of the body, not the pause between two parts of it."""
    connection = Connection(CHAT)
    running = connection.run(Service(**SLOW).app)
    for _ in range(100):
        if running.done():
            break
        connection.feed(b" ", more=True)
        await asyncio.sleep(0.02)
    assert connection.status == 408


async def test_intake_gives_a_large_body_more_time(monkeypatch):
    """At a rate that any line has; what has come counts."""
    monkeypatch.setattr(intake_module, "MIN_BYTES_PER_S", 1000)
    intake = Intake(max_bytes=10_000, timeout_s=0.1)
    arriving = Arriving(intake)
    arriving.feed(b"a" * 500, more=True)
    await asyncio.sleep(0.3)
    arriving.feed(b"b")
    assert await arriving.task == b"a" * 500 + b"b"


async def test_intake_lets_the_oldest_give_way_when_places_are_needed(monkeypatch):
    """So clients that send slowly push out each other, and whoever sends at once is served."""
    monkeypatch.setattr(intake_module, "YOUNG_S", 0.05)
    intake = Intake(max_bytes=100, timeout_s=60, places=3)
    slow = [Arriving(intake) for _ in range(3)]
    await asyncio.sleep(0.1)
    quick = Arriving(intake)
    quick.feed(b"quick")
    assert await asyncio.wait_for(quick.task, 5) == b"quick"
    with pytest.raises(BodyTimeout):
        await asyncio.wait_for(slow[0].task, 5)
    assert not slow[1].task.done()
    for each in slow[1:]:
        each.feed(b"late")
        assert await each.task == b"late"


async def test_intake_can_push_out_one_that_ends_just_now():
    """Its own time and the need for its place come in the same moment."""
    intake = Intake(max_bytes=100, timeout_s=0.05, places=1)
    slow = Arriving(intake)
    await asyncio.sleep(0.01)
    loop = asyncio.get_running_loop()
    pushed = loop.create_future()

    def push():
        try:
            pushed.set_result(intake._push_out(0))
        except Exception as error:  # noqa: BLE001 (any would be a fault)
            pushed.set_exception(error)

    loop.call_later(0.045, push)
    time.sleep(0.1)  # noqa: ASYNC251 (both timers are due when the loop goes on)
    await pushed
    with pytest.raises(BodyTimeout):
        await slow.task


async def test_intake_asks_a_burst_to_come_back():
    """Nobody who has just begun is pushed out: more than there are places is a 429."""
    intake = Intake(max_bytes=100, timeout_s=60, places=2)
    young = [Arriving(intake) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await Arriving(intake).task
    assert caught.value.details["retry_after_s"] >= 1
    for each in young:
        each.feed(b"a")
        assert await each.task == b"a"


async def test_intake_bounds_the_bytes_of_all_bodies(monkeypatch):
    """However many connections send large bodies at once; the oldest gives way."""
    monkeypatch.setattr(intake_module, "HELD_BODIES", 2)
    intake = Intake(max_bytes=100, timeout_s=60)
    large = [Arriving(intake) for _ in range(3)]
    for each in large[:2]:
        each.feed(b"a" * 100, more=True)
        await asyncio.sleep(0.01)
    large[2].feed(b"b" * 50, more=True)
    with pytest.raises(BodyTimeout):
        await asyncio.wait_for(large[0].task, 5)
    for each in large[1:]:
        each.feed(b"")
    assert [len(await each.task) for each in large[1:]] == [100, 50]
    assert intake._held_bytes == 0


@pytest.mark.parametrize("length", [101, 10**30])
async def test_intake_does_not_read_a_body_announced_too_large(length):
    """Nor does it take a place."""
    intake = Intake(max_bytes=100, timeout_s=60, places=1)
    with pytest.raises(RequestTooLarge):
        await Arriving(intake, length=length).task
    fine = Arriving(intake, length=100)
    fine.feed(b"a" * 100)
    assert len(await fine.task) == 100


async def test_intake_closes_nothing_for_thousands_of_slow_bodies():
    """More than there are places: probes and requests are answered at once, and all end."""
    service = Service(body_timeout_s=5)
    slow = [Connection(CHAT) for _ in range(1300)]
    for each in slow:
        each.feed(b"{", more=True)
    running = [each.run(service.app) for each in slow]
    await asyncio.sleep(1.1)
    async with asyncio.timeout(3):
        assert (await service.request("GET", "/health")).status_code == 200
        assert (await service.request("GET", "/ready")).status_code == 200
        assert (await service.chat()).status_code == 200
    for each in slow:
        each.disconnect()
    await asyncio.gather(*running)
    statuses = {each.status for each in slow if each.sent}
    assert statuses <= {408, 429, 499}
    assert len(service.records) == 1301
    assert (await service.post(CHAT, HELLO)).status_code == 200
    await until(lambda: not service.engine.running)
