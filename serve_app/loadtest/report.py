"""The report: one JSON document, and the table people read.

`serve-app/loadtest/1` is the document's schema; a field is added, never changed or removed,
without a new number. It holds no prompt, no answer and no key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from serve_app.errors import ConfigError
from serve_app.loadtest.summary import PERCENTILES, Json

SCHEMA = "serve-app/loadtest/1"
LABELS = {"ttft_s": "ttft", "itl_s": "itl", "tpot_s": "tpot", "e2e_s": "e2e"}


def document(about: Json, stages: Sequence[Json], **more: Json | None) -> Json:
    """Put a report together.

    Args:
        about: target, model, time and settings.
        stages: as `summarise` made them.
        more: `timeline` and `search`, each None if there is none.
    """
    return {"schema": SCHEMA, **about, **more, "stages": list(stages)}


def write(report: Json, path: Path) -> None:
    """Write the JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, separators=(",", ":"), allow_nan=False), encoding="utf-8")


def load(path: Path) -> Json:
    """Read a JSON document.

    Raises:
        ConfigError: not a report of this schema.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {type(error).__name__}") from None
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise ConfigError(f"{path} is not a report of schema {SCHEMA}")
    return report


def table(report: Json) -> str:
    """Render every stage for a terminal, and what was found."""
    lines = [f"{report['model']} at {report['target']}"]
    for stage in report["stages"]:
        lines += ["", *_stage(stage)]
    if search := report["search"]:
        lines += ["", verdict(search)]
    return "\n".join(lines)


def verdict(search: Json) -> str:
    """Say what a goodput search found, in one sentence."""
    goal = f"{search['attainment']:.0%} of the requests meet the SLO"
    if search["holds"] is None:
        return f"At no rate that was tried {goal}."
    text = f"Up to {search['holds']:.3g} req/s {goal}"
    if search["breaks"] is None:
        return f"{text}; no rate that was tried broke it."
    return f"{text}; at {search['breaks']:.3g} req/s fewer do."


def milliseconds(seconds: float | None) -> str:
    """Write a time as people compare it: three digits, in ms or s."""
    if seconds is None:
        return "-"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def facts(stage: Json) -> Iterator[tuple[str, str]]:
    """Yield what there is to say of a stage besides its latencies: (label, text)."""
    errors = ", ".join(f"{count} {kind}" for kind, count in sorted(stage["errors"].items()))
    yield (
        "requests",
        f"{stage['requests']} counted, {stage['completed']} ok, {errors or 'no errors'}",
    )
    rate = f"{stage['req_s']:.4g} req/s, {stage['output_tok_s']:.4g} output tok/s"
    yield "throughput", f"{rate}, {stage['in_flight']:.3g} in flight"
    if (goodput := stage["goodput"]) and goodput["share"] is not None:
        yield "goodput", f"{goodput['req_s']:.4g} req/s, {goodput['share']:.1%} within the SLO"
    if stage.get("left_out"):
        yield "window", f"{stage['left_out']} longer than the model's window were left out"
    client = stage["client"]
    busy = f"{client['cpu_share_max']:.0%} CPU of the busiest of {client['processes']}"
    yield "client", f"{busy}, event loop {milliseconds(client['loop_lag_p99_s'])} late (p99)"
    if client["bottleneck"]:
        yield "WARNING", f"the client was the bottleneck: {'; '.join(client['reasons'])}"


def _stage(stage: Json) -> Iterator[str]:
    loop, counted = stage["loop"], stage["duration_s"] - stage["warmup_s"]
    yield f"{stage['name']} ({loop} loop, {counted:.3g} s after {stage['warmup_s']:.3g} s warm-up)"
    for label, text in facts(stage):
        yield f"  {label:<11}{text}"
    yield "  " + " " * 11 + "".join(f"{f'p{rank}':>10}" for rank in PERCENTILES)
    for name, label in LABELS.items():
        spread = stage["latency"][name] or {}
        cells = (milliseconds(spread.get(f"p{rank}")) for rank in PERCENTILES)
        yield f"  {label:<11}" + "".join(f"{cell:>10}" for cell in cells)
