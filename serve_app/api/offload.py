"""Work of a request that takes milliseconds, off the event loop and one piece at a time.

Streams of everybody share the event loop, so that reading 2 MB of JSON or writing 50 MB must
not happen there. One thread is enough: the work holds the interpreter's lock, more threads
would only take more of it from the loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")

# Below this, in bytes of JSON, the work takes less than a millisecond.
INLINE_BYTES = 32_768


class Offload:
    """One thread for the long work of one application."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="serve-app-api")

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise what it raises.

        Args:
            size: of what it works on, about, in bytes of JSON; small work is done at once.
            work: pure, since a client that leaves does not stop it.
        """
        if size <= INLINE_BYTES:
            return work()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, copy_context().run, work)
