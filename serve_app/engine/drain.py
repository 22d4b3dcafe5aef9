"""How fast an engine gets through its work, for Retry-After."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

# Finished requests that the rate is measured over.
WINDOW = 64


@dataclass(frozen=True, slots=True)
class DrainRate:
    """What was finished per second of late.

    Args:
        requests: > 0.
        tokens: that they could have come to, prompt and completion, > 0.
    """

    requests: float
    tokens: float


class DrainMeter:
    """Measures the rate; one thread notes, any thread asks."""

    def __init__(self) -> None:
        self._finished: deque[tuple[float, int]] = deque(maxlen=WINDOW)  # when, tokens

    def note(self, tokens: int) -> None:
        """Note that a request is finished, and the tokens that it could have come to."""
        self._finished.append((time.monotonic(), tokens))

    def rate(self) -> DrainRate | None:
        """Return the rate since the oldest that is remembered; None before two are."""
        finished = tuple(self._finished)
        if len(finished) < 2:
            return None
        seconds = max(1e-3, time.monotonic() - finished[0][0])
        return DrainRate(len(finished) / seconds, sum(tokens for _, tokens in finished) / seconds)
