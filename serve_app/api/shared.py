"""One computation for all who ask at the same time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """The latest result of a computation that many may ask for at once.

    Args:
        compute: what everybody asks for.
        fresh_s: age up to which a result is handed out again; 0 shares what is under way alone.
    """

    def __init__(self, compute: Callable[[], Awaitable[T]], *, fresh_s: float = 0.0) -> None:
        self._compute = compute
        self._fresh_s = fresh_s
        self._task: asyncio.Task[T] | None = None
        self._done_at = 0.0

    async def get(self) -> T:
        """Return the result, or raise what the computation raises.

        One who goes away while it is under way does not end it for the others.
        """
        if self._task is None or (self._task.done() and not self._is_fresh(self._task)):
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(_seen)  # also if all who asked have gone
        return await asyncio.shield(self._task)

    async def _run(self) -> T:
        try:
            return await self._compute()
        finally:
            self._done_at = time.monotonic()

    def _is_fresh(self, task: asyncio.Task[T]) -> bool:
        failed = task.cancelled() or task.exception() is not None
        return not failed and time.monotonic() - self._done_at < self._fresh_s


def _seen(task: asyncio.Task[T]) -> None:
    if not task.cancelled():
        task.exception()
