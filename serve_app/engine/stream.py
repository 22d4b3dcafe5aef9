"""The way from the engine thread to a reader's event loop."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from serve_app.engine.sequence import Update
from serve_app.errors import EngineError, InvalidRequest, ServeAppError

# What carries a delta to its client costs a quarter of a millisecond of a core, however long the
# delta is (`scripts/bench_carry`), most of it in the one process that is an ingress. Many streams
# share that: each waits its turn, and what comes meanwhile goes along.
DELTAS_PER_S = 4000
MAX_DELTA_INTERVAL_S = 0.1


def delta_interval_s(streams: int) -> float:
    """Return the seconds between two deltas of a stream at the least, by how many there are."""
    return min(MAX_DELTA_INTERVAL_S, streams / DELTAS_PER_S)


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
        self._timer: asyncio.TimerHandle | None = None  # wakes the reader when it is due

    async def updates(self) -> list[Update]:
        """Wait for updates and return all that are there.

        Raises:
            EngineError: the request failed; nothing comes after it.
            InvalidRequest: the same, and it is the request's own fault.
        """
        await self._arrived.wait()
        self._arrived.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
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
        # An end never waits for its turn: its client would hold its connection for nothing.
        if ended or self.loop.time() >= self._due:
            self._arrived.set()
        elif self._timer is None:
            self._timer = self.loop.call_at(self._due, self._arrived.set)

    def fail(self, error: ServeAppError) -> None:
        """End the stream with an error; any thread."""
        with suppress(RuntimeError):  # the reader's loop is closed: nobody is there to read it
            self.loop.call_soon_threadsafe(self._fail, error)

    def _fail(self, error: ServeAppError) -> None:
        # The first stays: a fault of its own says more than that the replica died after it.
        self._error = self._error or error
        self._arrived.set()


def deliver(streams: Mapping[int, Stream], updates: Iterable[Update]) -> list[int]:
    """Hand a step's updates to their readers' event loops; on the engine thread.

    Returns:
        The keys whose event loop is closed: nobody reads any more.
    """
    # One call for each event loop: waking it costs more than what one stream does there.
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Stream, Update]]] = defaultdict(list)
    for update in updates:
        stream = streams.get(update.key)
        if stream is not None:
            by_loop[stream.loop].append((stream, update))
    unread = []
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_push, pairs)
        except RuntimeError:
            unread += [update.key for _, update in pairs]
    return unread


def _push(pairs: list[tuple[Stream, Update]]) -> None:
    for stream, update in pairs:
        stream.push(update)


def by_key(updates: list[Update]) -> dict[int, list[Update]]:
    """Part the updates of a request's completions, in order."""
    grouped: dict[int, list[Update]] = defaultdict(list)
    for update in updates:
        grouped[update.key].append(update)
    return grouped
