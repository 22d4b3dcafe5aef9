"""The highest rate that still holds the SLO.

Doubles until a rate breaks it (or halves until one holds), then halves the bracket on a log
scale. It looks for a rate of arrivals and not for a number of clients: clients who wait for
their answers slow down with the server, and a closed loop holds any SLO by asking less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from serve_app.loadtest.summary import Json

PRECISION = 1.1  # the bracket's width at the end
STEPS = 10  # doublings or halvings before it gives up


@dataclass(frozen=True, slots=True)
class Found:
    """The end of a search.

    Args:
        holds: highest rate that held, requests per second; None if none did.
        breaks: lowest rate that did not; None if every one held.
    """

    holds: float | None
    breaks: float | None


def holds(stage: Json, *, attainment: float) -> bool:
    """Tell whether enough of a stage's requests were good."""
    share = stage["goodput"]["share"]
    return share is not None and share >= attainment


def search(holds_at: Callable[[float], bool | None], *, first: float) -> Found:
    """Find the highest rate.

    Args:
        holds_at: measures a rate; None ends the search.
        first: where to begin, requests per second.
    """
    found = _bracket(holds_at, first)
    while found.holds and found.breaks and found.breaks / found.holds > PRECISION:
        middle = math.sqrt(found.holds * found.breaks)
        held = holds_at(middle)
        if held is None:
            return found
        found = Found(middle, found.breaks) if held else Found(found.holds, middle)
    return found


def _bracket(holds_at: Callable[[float], bool | None], first: float) -> Found:
    found, rate = Found(None, None), first
    for _ in range(STEPS):
        held = holds_at(rate)
        if held is None:
            break
        found = Found(rate, found.breaks) if held else Found(found.holds, rate)
        if found.holds and found.breaks:
            break
        rate = rate * 2 if held else rate / 2
    return found
