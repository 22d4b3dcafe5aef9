"""Signs of life in a stream between two processes.

A process that was stopped, swapped out or cut off says nothing, and neither does one that
computes a long prompt. So whoever writes a stream adds a heartbeat where there is no item for a
while, and whoever reads it knows after some missing ones that nothing will come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, TypeVar

from serve_app.errors import EngineDead, NotReady
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


async def without_heartbeats(
    items: Any, *, patience_s: float, stall_timeout_s: float
) -> AsyncGenerator[Any, None]:
    """Read what `with_heartbeats` wrote in another process, and return the items alone.

    Args:
        items: an asynchronous iterator.
        patience_s: how long the first item may take in all: in a line, or while a replica starts.
        stall_timeout_s: how long nothing at all may come once something has.

    Raises:
        NotReady: the first item did not come in time.
        EngineDead: the writer gives no sign of life any more.
    """
    deadline: float | None = time.monotonic() + patience_s
    limit = patience_s
    while True:
        try:
            async with asyncio.timeout(limit):
                item = await anext(items)
        except StopAsyncIteration:
            return
        except TimeoutError:
            if deadline is not None and time.monotonic() >= deadline:
                raise NotReady(
                    f"no replica answered within {patience_s:g} s; retry later"
                ) from None
            raise EngineDead(
                f"the replica gave no sign of life for {limit:g} s; retry the request",
                cause="stalled",
            ) from None
        limit = stall_timeout_s
        if isinstance(item, Heartbeat):
            # Signs of life do not prolong what a first item may take in all.
            if deadline is not None:
                limit = min(limit, max(0.0, deadline - time.monotonic()))
            continue
        deadline = None
        yield item


async def _next(items: AsyncIterator[ItemT]) -> ItemT:
    return await anext(items)
