"""The `coldstart` command: the past starts of every replica, by phase."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from serve_app.access.report import aligned
from serve_app.cluster.connection import joined
from serve_app.telemetry import cold_start
from serve_app.telemetry.cold_start import Start

HEAD = ("STARTED", "APPLICATION", "REPLICA", "NODE", "WEIGHTS FROM", "READY")


def run(address: str | None, *, as_json: bool = False) -> int:
    """Show the starts that the cluster remembers, oldest first.

    Args:
        address: of the Ray cluster; None takes RAY_ADDRESS, or what `ray start` recorded.
        as_json: print one JSON object for each start instead of a table.

    Returns:
        The exit code: 0 if a start is known, else 4.

    Raises:
        ConfigError: no cluster runs there.
    """
    with joined(address):
        starts = cold_start.recent()
    if not starts:
        print("No replica has started on this cluster yet.", file=sys.stderr)
        return 4
    for line in map(json.dumps, map(facts, starts)) if as_json else table(starts):
        print(line)
    return 0


def facts(start: Start) -> dict[str, Any]:
    """Return a start for machines; `at_s` counts from the first phase's beginning."""
    spans = [
        {
            "phase": span.phase,
            "at_s": round(span.started_at - start.started_at, 3),
            "duration_s": round(span.duration_s, 3),
        }
        for span in start.spans
    ]
    return asdict(start) | {"started_at": start.started_at, "spans": spans}


def table(starts: Sequence[Start]) -> Iterator[str]:
    """Yield one row for each start; READY and the phases are in seconds.

    Phases may overlap: `libraries` runs beside `check` and `download`. `first_token` is the
    first answer, which comes after the replica is ready.
    """
    phases = list(dict.fromkeys(span.phase for start in starts for span in start.spans))
    rows = [(*HEAD, *phases)]
    for start in starts:
        seconds = {span.phase: f"{span.duration_s:.2f}" for span in start.spans}
        moved = (f"{name} {size:,}" for name, size in start.weights_bytes.items() if size)
        rows.append(
            (
                datetime.fromtimestamp(start.started_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                start.application,
                start.replica,
                start.node,
                ", ".join(moved) or "-",
                f"{start.ready_s:.1f}",
                *(seconds.get(phase, "-") for phase in phases),
            )
        )
    yield from aligned(rows)
