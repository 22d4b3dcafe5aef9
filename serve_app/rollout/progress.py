"""Lines about replicas that start: each phase once, and every few seconds how the weights come."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serve_app.telemetry.cold_start import Phase

EVERY_S = 5.0


@dataclass(frozen=True, slots=True)
class _Shown:
    """The last line about a replica."""

    phase: Phase
    at: float


class Progress:
    """Remembers what was last printed of each replica.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._shown: dict[str, _Shown] = {}

    def lines(self, phases: Mapping[str, Phase]) -> list[str]:
        """Return what is new, a line for each replica.

        Args:
            phases: what each starting replica is at, by its id.
        """
        now = self._clock()
        lines = []
        for replica, phase in sorted(phases.items()):
            shown = self._shown.get(replica)
            if shown is None or shown.phase.name != phase.name:  # the bytes are not yet counted
                words = phase.name
            elif now - shown.at >= EVERY_S and _is_coming(shown.phase, phase):
                words = f"{phase.name} {_amount(shown.phase, phase)}"
            else:
                continue
            self._shown[replica] = _Shown(phase, now)
            lines.append(f"{replica}: {words}")
        return lines


def _amount(before: Phase, now: Phase) -> str:
    """Say how much is here, and how fast the rest comes, by the time since the line before."""
    done, total = now.done_bytes or 0, now.total_bytes or 0
    scale, unit = (1e9, "GB") if total >= 1e9 else (1e6, "MB")
    words = f"{done / scale:.1f} of {total / scale:.1f} {unit}"
    # The node's own clock on both sides: this machine's would count the way of the news.
    seconds = now.published_at - before.published_at
    if before.done_bytes is None or seconds <= 0:
        return words
    rate = max(0, done - before.done_bytes) / seconds
    words = f"{words}, {rate / 1e6:.1f} MB/s"
    return f"{words}, {_left((total - done) / rate)} left" if rate else words


def _is_coming(before: Phase, now: Phase) -> bool:
    """Return whether there is something to say: not of who waits, and not of what is all here."""
    whole = now.done_bytes == now.total_bytes
    return now.done_bytes is not None and not (whole and before.done_bytes == now.done_bytes)


def _left(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
