"""The way from the engine thread to a reader's event loop."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress

from serve_app.engine.sequence import Update
from serve_app.errors import EngineError, InvalidRequest, ServeAppError


class Stream:
    """Updates of one request on their way from the engine thread to its reader.

    Args:
        loop: the reader's event loop; everything but `fail` happens on it.
        interval: seconds between two reads at the least; the first and the last never wait.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, interval: Callable[[], float]) -> None:
        self.loop = loop
        self.over: set[int] = set()  # keys of sequences that have ended
        self._interval = interval
        self._due = 0.0
        self._updates: list[Update] = []
        self._error: ServeAppError | None = None
        self._arrived = asyncio.Event()

    async def updates(self) -> list[Update]:
        """Wait for updates and return all that are there.

        Raises:
            EngineError: the request failed; nothing comes after it.
            InvalidRequest: the same, and it is the request's own fault.
        """
        await self._arrived.wait()
        self._arrived.clear()
        self._due = self.loop.time() + self._interval()
        updates, self._updates = self._updates, []
        if self._error is not None:
            raise self._error
        return updates

    def push(self, update: Update) -> None:
        """Take an update; on the reader's loop."""
        if update.fault is not None and update.refused:
            self._error = InvalidRequest(
                f"The structure cannot be enforced any further: {update.fault}.", param="structure"
            )
        elif update.fault is not None:
            self._error = EngineError(f"Generation failed: {update.fault}")
        else:
            self._updates.append(update)
        ended = update.fault is not None or update.finish_reason is not None
        if ended:
            self.over.add(update.key)
        if ended or self.loop.time() >= self._due:
            self._arrived.set()
        else:
            self.loop.call_at(self._due, self._arrived.set)

    def fail(self, error: ServeAppError) -> None:
        """End the stream with an error; any thread."""
        with suppress(RuntimeError):  # the reader's loop is closed: nobody is there to be told
            self.loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: ServeAppError) -> None:
        self._error = self._error or error
        self._arrived.set()


def hand_over(pairs: list[tuple[Stream, Update]]) -> None:
    """Give a step's updates to their streams; on the reader's loop."""
    for stream, update in pairs:
        stream.push(update)


def by_key(updates: list[Update]) -> dict[int, list[Update]]:
    """Part the updates of a request's completions, in order."""
    grouped: dict[int, list[Update]] = defaultdict(list)
    for update in updates:
        grouped[update.key].append(update)
    return grouped
