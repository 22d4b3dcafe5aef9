"""Signs of life between two deltas: a lost writer is known within the limit, a slow one waits."""

import asyncio

import pytest

from serve_app.deployments.heartbeats import with_heartbeats, without_heartbeats
from serve_app.errors import EngineDead, NotReady
from serve_app.protocol import Heartbeat


async def items(*course):
    """Yield what is no number, and pause for what is."""
    for step in course:
        if isinstance(step, float):
            await asyncio.sleep(step)
        else:
            yield step


async def read(stream, *, patience_s=5.0, stall_timeout_s=0.2):
    return [
        item
        async for item in without_heartbeats(
            stream, patience_s=patience_s, stall_timeout_s=stall_timeout_s
        )
    ]


async def test_with_heartbeats_passes_items_in_order_and_begins_with_one():
    """Its reader knows at once that somebody has taken the request on."""
    written = [item async for item in with_heartbeats(items("a", "b"), 1.0)]
    assert written == [Heartbeat(), "a", "b"]


async def test_with_heartbeats_fills_a_pause():
    """A long prompt is no lost replica."""
    written = [item async for item in with_heartbeats(items("a", 0.35, "b"), 0.1)]
    assert [item for item in written if item != Heartbeat()] == ["a", "b"]
    assert 3 <= written.count(Heartbeat()) <= 5
    stream = with_heartbeats(items(0.5, "a", 0.5, "b"), 0.05)
    assert await read(stream) == ["a", "b"]


async def test_with_heartbeats_passes_an_error():
    """At its place, once."""

    async def failing():
        yield "a"
        raise ValueError("fault")

    stream = with_heartbeats(failing(), 0.1)
    assert [await anext(stream) for _ in range(2)] == [Heartbeat(), "a"]
    with pytest.raises(ValueError, match="fault"):
        await anext(stream)


@pytest.mark.parametrize("taken", [0, 1, 2])
async def test_with_heartbeats_closed_closes_what_is_read(taken):
    """Also while an item is awaited; the engine is free within a step."""
    closed = asyncio.Event()

    async def endless():
        try:
            yield "a"
            await asyncio.sleep(60)
        finally:
            closed.set()

    stream = with_heartbeats(endless(), 0.05)
    for _ in range(taken + 1):
        await anext(stream)
    if taken == 2:
        assert await anext(stream) == Heartbeat()
    await stream.aclose()
    assert closed.is_set() == bool(taken)


async def test_with_heartbeats_cancelled_closes_what_is_read():
    """As Serve does it when a client goes away."""
    closed = asyncio.Event()

    async def endless():
        try:
            await asyncio.sleep(60)
            yield "a"
        finally:
            closed.set()

    async def reader():
        async for _ in with_heartbeats(endless(), 0.05):
            pass

    task = asyncio.create_task(reader())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()


async def test_read_treats_a_silent_writer_as_lost():
    """Before its first item or between two, as soon as it has said anything."""
    for course in (
        (Heartbeat(), 9.0),
        (Heartbeat(), "a", 9.0),
        (Heartbeat(), "a", Heartbeat(), 9.0),
    ):
        with pytest.raises(EngineDead, match=r"no sign of life for 0\.2 s"):
            await asyncio.wait_for(read(items(*course)), 2)


async def test_read_allows_a_long_line_but_not_one_without_end():
    """Nobody has taken the request on; or somebody has and the first item takes too long."""
    assert await read(items(0.5, Heartbeat(), "a")) == ["a"]
    with pytest.raises(NotReady, match=r"within 0\.3 s"):
        await read(items(9.0), patience_s=0.3)
    alive = with_heartbeats(items(9.0, "a"), 0.05)
    with pytest.raises(NotReady, match=r"within 0\.3 s"):
        await asyncio.wait_for(read(alive, patience_s=0.3), 2)


async def test_read_counts_only_signs_of_life_after_the_first_item():
    """What streams may pause for longer than the first item may take."""
    stream = with_heartbeats(items("a", 0.6, "b"), 0.05)
    assert await read(stream, patience_s=0.3) == ["a", "b"]
