"""Signs of life between two items of a stream."""

import asyncio

import pytest

from serve_app.deployments.heartbeats import with_heartbeats
from serve_app.protocol import Heartbeat


async def items(*course):
    """Yield what is no number, and pause for what is."""
    for step in course:
        if isinstance(step, float):
            await asyncio.sleep(step)
        else:
            yield step


async def test_with_heartbeats_passes_items_in_order_and_begins_with_one():
    """Its reader knows at once that somebody has taken the request on."""
    written = [item async for item in with_heartbeats(items("a", "b"), 1.0)]
    assert written == [Heartbeat(), "a", "b"]


async def test_with_heartbeats_fills_a_pause():
    """A long prompt is no lost replica."""
    written = [item async for item in with_heartbeats(items("a", 0.35, "b"), 0.1)]
    assert [item for item in written if item != Heartbeat()] == ["a", "b"]
    assert 3 <= written.count(Heartbeat()) <= 5


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
