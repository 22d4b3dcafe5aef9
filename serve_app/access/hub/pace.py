"""How slow is too slow: bytes that must come within a time, or the way is given up."""

from __future__ import annotations

import time

STALL_S = 60.0
LEAST_BYTES = 256 << 10  # within it; about 4 KB a second


class Stalled(Exception):
    """Too few bytes came for too long."""


class Pace:
    """Watches one transfer.

    Args:
        stall_s: the time.
        least_bytes: the bytes.
    """

    def __init__(self, *, stall_s: float = STALL_S, least_bytes: int = LEAST_BYTES) -> None:
        self.stall_s = stall_s
        self._least_bytes = least_bytes
        self._since = time.monotonic()
        self._bytes = 0

    def moved(self, count: int) -> None:
        """Count bytes that came, or look at the clock with 0.

        Raises:
            Stalled: too few came since the last mark.
        """
        self._bytes += count
        if self._bytes >= self._least_bytes:
            self._since, self._bytes = time.monotonic(), 0
        elif time.monotonic() - self._since > self.stall_s:
            raise Stalled(f"fewer than {self._least_bytes:,} bytes in {self.stall_s:g} s")
