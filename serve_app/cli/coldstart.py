"""The `coldstart` command: the latest starts of every replica as waterfalls, against forecasts."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import ray

from serve_app.cluster.connection import find_cluster
from serve_app.errors import ConfigError
from serve_app.redaction import sanitise
from serve_app.rollout.forecast import Forecast, before, fetched_bytes, forecast
from serve_app.telemetry import cold_start
from serve_app.telemetry.cold_start import Start

WIDTH = 48  # characters of the whole start
BAR = "="


def run(address: str | None, *, as_json: bool = False) -> int:
    """Show the starts that the cluster remembers, oldest first.

    Args:
        address: of the Ray cluster; None takes RAY_ADDRESS, or what `ray start` recorded.
        as_json: print one JSON object for each start; `forecast` is null where none was possible.

    Returns:
        The exit code: 0 if a start is known, else 4.

    Raises:
        ConfigError: no cluster runs there.
    """
    starts = _recent(address)
    for start in starts:
        expected = forecast(before(start, starts), fetch_bytes=fetched_bytes(start))
        if as_json:
            print(json.dumps(facts(start) | {"forecast": expected and asdict(expected)}))
        else:
            print("\n".join(waterfall(start, expected)) + "\n")
    if not starts:
        print("No replica has started on this cluster yet.", file=sys.stderr)
    return 0 if starts else 4


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


def waterfall(start: Start, expected: Forecast | None) -> Iterator[str]:
    """Draw a start: one bar for each phase, on the scale of the whole until ready.

    Args:
        start: what was.
        expected: what the starts before it made one expect; stands in brackets.
    """
    moment = datetime.fromtimestamp(start.started_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    yield f"{start.application} {start.replica} on {start.node}: {start.ready_s:.1f} s, {moment}"
    if expected is None:
        yield "  no earlier start to forecast it from"
    else:
        learned = f"{expected.starts} earlier start{'s' if expected.starts > 1 else ''}"
        yield f"  forecast [{expected.ready_s:.1f} s] from {learned}"
    moved = [f"{size:,} bytes from {name}" for name, size in start.weights_bytes.items() if size]
    if moved:
        yield f"  {', '.join(moved)}"
    scale = WIDTH / max(start.ready_s, 0.001)
    for span in start.spans:
        at_s = span.started_at - start.started_at
        bar = BAR * max(1, round(span.duration_s * scale))
        # The first token comes with the first request, long after the start perhaps.
        offset = WIDTH if at_s > start.ready_s else round(at_s * scale)
        foretold = expected and expected.phases.get(span.phase)
        told = "" if foretold is None else f"[{foretold:.2f}]"
        yield f"  {span.phase:<12}{span.duration_s:>8.2f} s {told:>9}  {' ' * offset}{bar}"


def _recent(address: str | None) -> list[Start]:
    if ray.is_initialized():
        return cold_start.recent()
    found = find_cluster(address)
    if found is None:
        raise ConfigError("no Ray cluster is running here; name one with --address")
    try:
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {found}: {sanitise(str(error))}") from None
    try:
        return cold_start.recent()
    finally:
        ray.shutdown()
