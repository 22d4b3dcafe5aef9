"""Whether other processes still write to the cluster's key-value store, by their values alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping


class Liveness:
    """Takes a writer whose value has not changed for some time as ended.

    No clocks are compared: what counts is when this process first saw a value.

    Args:
        lost_s: seconds without another value after which a writer has ended.
        clock: monotonic seconds.
    """

    def __init__(self, lost_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._lost_s = lost_s
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}  # values, and when each was seen first

    def alive(self, values: Mapping[str, bytes]) -> set[str]:
        """Return the keys whose writers have not ended; a key that is gone is forgotten.

        Args:
            values: of all keys that are there now.
        """
        now, seen = self._clock(), self._seen
        self._seen = {
            key: seen[key] if key in seen and seen[key][0] == value else (value, now)
            for key, value in values.items()
        }
        return {key for key, (_, since) in self._seen.items() if now - since <= self._lost_s}

    def forget(self) -> None:
        """Begin anew, as after a time in which nobody could write."""
        self._seen.clear()
