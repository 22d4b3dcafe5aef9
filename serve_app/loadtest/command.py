"""The commands `loadtest` and `capacity`.

Exit codes: 0 measured, 1 no request was answered, the SLO was never held, or a comparison
regressed, 2 a wrong option or no service, 130 interrupted (the reports are written).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from serve_app.config import parse_args
from serve_app.errors import ConfigError
from serve_app.loadtest import capacity, compare, page, report, stage
from serve_app.loadtest.capacity import Demand, Measured, Served, holds, search, served
from serve_app.loadtest.session import Bench, bench
from serve_app.loadtest.summary import Json
from serve_app.loadtest.traces import read_trace

FAILED, INTERRUPTED = 1, 130


def loadtest(options: argparse.Namespace) -> int:
    """Run `loadtest URL` or `loadtest compare A B`; returns the exit code."""
    word, *files = options.target
    if word == "compare":
        if len(files) != 2:
            raise ConfigError("write: loadtest compare BEFORE.json AFTER.json")
        return _compare(Path(files[0]), Path(files[1]), options.threshold)
    if files:
        raise ConfigError("give one URL")
    if options.goodput and not options.slo:
        raise ConfigError("--goodput needs --slo, such as --slo ttft=500ms,itl=60ms")
    with bench(options, word) as running:
        try:
            _offer(running)
        finally:
            whole = running.report()
            _write(whole, json_file=options.json, html_file=options.html)
    print(report.table(whole))
    return _exit_code(whole)


def run_capacity(options: argparse.Namespace) -> int:
    """Run `capacity URL|CONFIG`; returns the exit code."""
    service = served(options.target)
    replicas = options.replicas or service.replicas
    evidence = options.patch.with_suffix(".json")
    with bench(options, service.url) as running:
        try:
            _find(running)
            measured = _verify(running)
        finally:
            whole = running.report()
            _write(whole, json_file=evidence, html_file=options.html)
    print(report.table(whole))
    if measured is None:
        return _exit_code(whole) or FAILED
    assert running.slo is not None  # noqa: S101 - the option is required
    demand = Demand(options.peak, options.low, replicas)
    parts = capacity.recommend(measured, demand, running.slo)
    _write_patch(options.patch, parts, evidence, service, _said(whole, demand))
    return 0


def _offer(running: Bench) -> None:
    """Run the stages that the options ask for."""
    options = running.options
    if options.goodput:
        _find(running)
    elif options.trace:
        shots = read_trace(options.trace, speed=options.speed)
        span = running.span(options.duration)
        running.measure(stage.replay(options.trace.name, shots, span, seed=options.seed))
    elif options.concurrency:
        span = running.span(options.duration)
        running.measure(stage.closed(options.concurrency, running.lengths, span, seed=options.seed))
    else:
        for rate in options.sweep or [options.rate or 1.0]:
            running.poisson(rate)
            if running.stop.is_set():
                return


def _find(running: Bench) -> None:
    """Search the highest rate that holds the SLO."""
    attainment = running.options.attainment

    def holds_at(rate: float) -> bool | None:
        measured = running.poisson(rate)
        if running.stop.is_set() or not measured["completed"]:
            return None  # a service that answers nothing is not searched further
        return holds(measured, attainment=attainment)

    found = search(holds_at, first=running.options.start_rate)
    running.search = {"holds": found.holds, "breaks": found.breaks, "attainment": attainment}


def _verify(running: Bench) -> Measured | None:
    """Measure below and above the limit with other arrivals than the search saw."""
    limit: float | None = (running.search or {}).get("holds")
    if limit is None or running.stop.is_set():
        return None
    proposed = running.poisson(limit * capacity.HEADROOM, seed=1)
    if running.stop.is_set():
        return None
    overload = running.poisson(limit * capacity.OVERLOAD, seed=1)
    return None if running.stop.is_set() else Measured(limit, proposed, overload)


def _said(whole: Json, demand: Demand) -> str:
    proposed, overload = whole["stages"][-2:]
    lines = [
        f"Measured with {demand.replicas} replica(s) of {whole['model']}, {whole['created']}.",
        report.verdict(whole["search"]),
        f"At the proposed {proposed['rate']:.3g} req/s {proposed['goodput']['share']:.1%} did, "
        f"at {overload['rate']:.3g} req/s {overload['goodput']['share']:.1%}.",
    ]
    if not holds(proposed, attainment=whole["search"]["attainment"]):
        lines.append("WARNING: the proposed rate did not hold the SLO; measure longer.")
    if any(one["client"]["bottleneck"] for one in whole["stages"]):
        lines.append("WARNING: the client was the bottleneck in a stage; see the evidence.")
    return "\n".join(lines)


def _write_patch(
    path: Path, parts: dict[str, Json], evidence: Path, service: Served, said: str
) -> None:
    """Write the patch, after a look at the config that comes out with it."""
    text = capacity.patch(service.name, parts, evidence, said)
    if service.document is not None:
        change = {"applications": [{"name": service.name, "args": parts}]}
        merged = capacity.merge(service.document, change)
        for application in merged["applications"]:
            if application.get("name", "default") == service.name:
                parse_args(application["args"])
    path.write_text(text, encoding="utf-8")
    print(f"\n{text}\nWritten: {path}, evidence: {evidence}")


def _compare(before: Path, after: Path, threshold: float) -> int:
    changes = compare.compare(report.load(before), report.load(after), threshold=threshold)
    for change in changes:
        interval = f"[{change.low:+.1%}, {change.high:+.1%}]"
        print(
            f"{change.verdict:<10}{change.stage:<16}{change.quantity:<14}"
            f"{change.before:10.4g} -> {change.after:<10.4g} worse by {interval}"
        )
    return FAILED if any(change.verdict == "regressed" for change in changes) else 0


def _write(whole: Json, *, json_file: Path | None, html_file: Path | None) -> None:
    if json_file:
        report.write(whole, json_file)
    if html_file:
        html_file.write_text(page.render(whole), encoding="utf-8")


def _exit_code(whole: Json) -> int:
    if whole["interrupted"]:
        print("interrupted; the numbers are those until then", file=sys.stderr)
        return INTERRUPTED
    if not any(measured["completed"] for measured in whole["stages"]):
        return FAILED
    return FAILED if whole["search"] and whole["search"]["holds"] is None else 0
