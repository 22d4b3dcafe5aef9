"""Signs of life in a stream between two processes.

A process that was stopped, swapped out or cut off says nothing, and neither does one that
computes a long prompt. So whoever writes a stream adds a heartbeat where there is no item for a
while, and whoever reads it (`engine_client.py`) knows after some missing ones that nothing will
come. On a connection for frames an empty frame does the same for all of its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TypeVar

from serve_app.protocol import Heartbeat

ItemT = TypeVar("ItemT")

HEARTBEATS_PER_TIMEOUT = 4
HEARTBEAT = Heartbeat()


async def with_heartbeats(
    items: AsyncIterator[ItemT], interval_s: float
) -> AsyncGenerator[ItemT | Heartbeat, None]:
    """Pass items on, with a heartbeat before the first and after every `interval_s` without one.

    Closing this closes `items`.
    """
    coming: asyncio.Future[ItemT] | None = None
    try:
        # At once: the reader knows by it that somebody has taken the request on.
        yield HEARTBEAT
        while True:
            coming = asyncio.ensure_future(_next(items))
            # `wait` and not `wait_for`: a time-out must not cancel the item that is on its way.
            while not (await asyncio.wait((coming,), timeout=interval_s))[0]:
                yield HEARTBEAT
            try:
                item = coming.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if coming is not None and not coming.done():
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        close = getattr(items, "aclose", None)  # async generators have it, others need not
        if close is not None:
            await close()


async def _next(items: AsyncIterator[ItemT]) -> ItemT:
    return await anext(items)
