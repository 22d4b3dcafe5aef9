"""How long a replica's start will take, by the earlier ones of its application.

    ready = what lies between the phases
          + every phase but the two that run beside each other
          + the longer of `download` and `libraries`

each the median of the earlier starts, 0 where one had no such phase. `download` is the bytes to
fetch by the median rate of those that fetched, or, with nothing to fetch, the median of those
that fetched nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from serve_app.telemetry.cold_start import Start

BESIDE = ("download", "libraries")
AFTER = "first_token"  # comes with the first request, when the replica is ready already
FETCHED = ("hub", "peer")


@dataclass(frozen=True, slots=True)
class Forecast:
    """What earlier starts make one expect.

    Args:
        ready_s: from the beginning of the first phase to the replica taking requests, seconds.
        phases: seconds by phase.
        starts: how many earlier ones it was learned from.
    """

    ready_s: float
    phases: dict[str, float]
    starts: int


def forecast(earlier: Sequence[Start], *, fetch_bytes: int) -> Forecast | None:
    """Foretell a start.

    Args:
        earlier: starts of the same application.
        fetch_bytes: that its node has not and must fetch.

    Returns:
        None where nothing comparable is known: no start, or bytes to fetch and nobody fetched.
    """
    download_s = _download_s(earlier, fetch_bytes)
    if not earlier or download_s is None:
        return None
    known = [_seconds(start) for start in earlier]
    names = dict.fromkeys(name for phases in known for name in phases)
    # A worker that Ray had at hand spares a start some phases: they count as nothing there.
    phases = {name: statistics.median(p.get(name, 0.0) for p in known) for name in names}
    phases["download"] = download_s
    between = statistics.median(
        start.ready_s - _covered(own) for start, own in zip(earlier, known, strict=True)
    )
    return Forecast(max(0.0, between) + _covered(phases), phases, len(earlier))


def before(start: Start, starts: Sequence[Start]) -> list[Start]:
    """Return the starts of the same application that were over when this one began."""
    return [
        other
        for other in starts
        if other.application == start.application
        and other.started_at + other.ready_s <= start.started_at
    ]


def fetched_bytes(start: Start) -> int:
    """Return the bytes that a start brought to its node."""
    return sum(start.weights_bytes.get(source, 0) for source in FETCHED)


def _download_s(earlier: Sequence[Start], fetch_bytes: int) -> float | None:
    took = [(fetched_bytes(start), _seconds(start).get("download", 0.0)) for start in earlier]
    if not fetch_bytes:
        return statistics.median([seconds for size, seconds in took if not size] or [0.0])
    rates = [size / seconds for size, seconds in took if size and seconds]
    return fetch_bytes / statistics.median(rates) if rates else None


def _seconds(start: Start) -> dict[str, float]:
    return {span.phase: span.duration_s for span in start.spans if span.phase != AFTER}


def _covered(phases: dict[str, float]) -> float:
    beside = max(phases.get(name, 0.0) for name in BESIDE)
    return beside + sum(seconds for name, seconds in phases.items() if name not in BESIDE)
