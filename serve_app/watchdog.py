"""Notices work that does not end: a step of the engine, an event loop that is blocked.

A watchdog is a thread that looks at another one. It counts its own looks, not the clock: a
process that was stopped for an hour and goes on has not worked for an hour. What holds Python's
interpreter lock without end stops the watchdog as well; a health check from outside, which then
gets no answer, is for that.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import traceback
from collections.abc import Callable

MAX_STACK_CHARS = 4000


class Watchdog:
    """Calls `alarm` once when a piece of work has gone on for `limit_s`.

    Args:
        name: of its thread.
        working: returns what identifies the present piece of work, None between two.
        limit_s: seconds; looks ten times as often.
        alarm: called on the watchdog's thread with the seconds that it has seen.
    """

    def __init__(
        self,
        name: str,
        *,
        working: Callable[[], object | None],
        limit_s: float,
        alarm: Callable[[float], None],
    ) -> None:
        self._working = working
        self._interval_s = limit_s / 10
        self._limit_s = limit_s
        self._alarm = alarm
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=name, daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; calling it again, or without `start`, does nothing."""
        self._over.set()

    def _watch(self) -> None:
        seen: object | None = None
        seen_s = 0.0
        while not self._over.wait(self._interval_s):
            work = self._working()
            if work is None or work != seen:
                seen, seen_s = work, 0.0
                continue
            seen_s += self._interval_s
            if seen_s >= self._limit_s:
                self._alarm(seen_s)
                return


class LoopWatchdog:
    """Calls `alarm` once when an event loop has not come round for `limit_s`.

    Args:
        loop: the event loop.
        limit_s: seconds.
        alarm: called on a thread of its own with the seconds.
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, limit_s: float, alarm: Callable[[float], None]
    ) -> None:
        self._loop = loop
        self._asked = 0
        self._answered = 0
        self._watchdog = Watchdog("loop-watchdog", working=self._ask, limit_s=limit_s, alarm=alarm)

    def start(self) -> None:
        """Begin to look."""
        self._watchdog.start()

    def stop(self) -> None:
        """Look no more."""
        self._watchdog.stop()

    def _ask(self) -> int | None:
        """Ask the loop for a sign of life, unless it owes one; returns which it owes."""
        if self._answered == self._asked:
            self._asked += 1
            try:
                self._loop.call_soon_threadsafe(self._answer, self._asked)
            except RuntimeError:  # closed: its work is over
                self._answered = self._asked
                self._watchdog.stop()
            return None
        return self._asked

    def _answer(self, number: int) -> None:
        self._answered = number


def stack_of(thread_id: int | None) -> str:
    """Return where a thread is now, the innermost call last; "" if there is no such thread."""
    frame = sys._current_frames().get(thread_id) if thread_id is not None else None
    if frame is None:
        return ""
    return "".join(traceback.format_stack(frame))[-MAX_STACK_CHARS:]
