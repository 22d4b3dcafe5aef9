"""The options of `loadtest` and `capacity`; imports nothing heavy, for `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Run: TypeAlias = Callable[[argparse.Namespace], int]


def add_loadtest(commands: Commands, run: Run) -> None:
    """Add `loadtest URL` and `loadtest compare A B`."""
    parser = commands.add_parser("loadtest", help="measure latency, throughput and goodput")
    parser.add_argument(
        "target",
        nargs="+",
        metavar="URL",
        help="the service's root; or: compare BEFORE.json AFTER.json (exit 1 on a regression)",
    )
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--rate", type=_positive, help="open loop: Poisson arrivals per second")
    load.add_argument("--concurrency", type=_count, help="closed loop: clients that wait")
    load.add_argument("--sweep", type=_rates, metavar="R,R,...", help="one open loop after another")
    load.add_argument("--goodput", action="store_true", help="search the highest rate within --slo")
    load.add_argument(
        "--trace", type=Path, metavar="FILE", help="replay an Azure or Mooncake trace"
    )
    parser.add_argument("--speed", type=_positive, default=1.0, help="of the trace's time (1)")
    parser.add_argument("--slo", metavar="LIMITS", help="such as ttft=500ms,itl=60ms,e2e=10s")
    parser.add_argument(
        "--threshold", type=_percent, default=0.1, metavar="PERCENT", help="of compare (10)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page with plots")
    _add_load(parser)
    parser.set_defaults(command=run)


def add_capacity(commands: Commands, run: Run) -> None:
    """Add `capacity URL|CONFIG`."""
    parser = commands.add_parser("capacity", help="measure what replicas hold; propose a config")
    parser.add_argument("target", metavar="URL|CONFIG", help="a running service or its Serve YAML")
    parser.add_argument(
        "--slo", required=True, metavar="LIMITS", help="ttft=500ms,itl=60ms,e2e=10s"
    )
    parser.add_argument("--peak", required=True, type=_positive, help="requests/s to hold")
    parser.add_argument("--low", type=_positive, default=1e-9, help="requests/s in quiet hours")
    parser.add_argument("--replicas", type=_count, help="that serve now (default: of the config)")
    parser.add_argument(
        "--patch", type=Path, default=Path("capacity.yaml"), metavar="FILE", help="capacity.yaml"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the page with plots")
    _add_load(parser)
    parser.set_defaults(command=run)


def _add_load(parser: argparse.ArgumentParser) -> None:
    add: Any = parser.add_argument
    add("--prompt-tokens", default="256", metavar="N", help="N, A-B, normal:M,SD, lognormal:M,S")
    add("--output-tokens", default="64", metavar="N", help="in the same forms")
    add("--lengths", type=Path, metavar="FILE", help="draw both from ShareGPT or a trace")
    add("--duration", type=_positive, default=30.0, metavar="S", help="of each stage (30)")
    add("--warmup", type=_positive, metavar="S", help="not counted (a fifth of the stage)")
    add("--start-rate", type=_positive, default=1.0, help="where a search begins (1)")
    add("--attainment", type=_percent, default=0.95, metavar="PERCENT", help="of good ones (95)")
    add("--processes", type=_count, default=1, help="of the client (1)")
    add("--timeout", type=_positive, default=120.0, metavar="S", help="of a request (120)")
    add("--model", help="name in requests (default: the first of /v1/models)")
    add("--completions", action="store_true", help="ask /v1/completions instead of chat")
    add("--api-key-file", type=Path, metavar="FILE", help="whose key is sent and never written")
    add("--metrics-url", metavar="URL", help="Prometheus page (default: URL/metrics)")
    add("--seed", type=int, default=0, help="of arrivals, lengths and words (0)")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError("must be a positive number")
    return value


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100_000:
        raise argparse.ArgumentTypeError("must be a whole number from 1")
    return value


def _rates(text: str) -> list[float]:
    return [_positive(part) for part in text.split(",")]


def _percent(text: str) -> float:
    value = float(text.removesuffix("%")) / 100
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be a percentage")
    return value
