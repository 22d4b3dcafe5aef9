"""From what the runs said to medians, ratios and shares of what the machine can do."""

from __future__ import annotations

import itertools
import os
import platform
import statistics
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scripts.bench.workload import Request

OURS, REFERENCE, ROOFLINE = "serve-app", "generate", "roofline"
FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
MEASURES = ("tok_s", "ttft_p50_s", "ttft_p95_s", "itl_p50_s", "itl_p95_s")


@dataclass(frozen=True)
class Record:
    """One contender's turn.

    Args:
        name: the contender.
        number: of the round.
        streams: requests at once.
        requests: what it was given.
        answer: what it said.
    """

    name: str
    number: int
    streams: int
    requests: list[Request]
    answer: dict[str, Any]

    @property
    def came(self) -> list[dict[str, Any]]:
        """The streams, in the order of the requests."""
        return [stream for result in self.answer["results"] for stream in result]

    @property
    def measures(self) -> dict[str, float]:
        """Tokens a second and the quantiles of the times between them."""
        results = self.answer["results"]
        seconds = sum(max(stream["times"][-1] for stream in result) for result in results)
        ttft = [stream["times"][0] for stream in self.came]
        itl = [b - a for stream in self.came for a, b in itertools.pairwise(stream["times"])]
        values = (
            sum(len(stream["ids"]) for stream in self.came) / seconds,
            *(_quantile(times, q) for times in (ttft, itl) for q in (0.5, 0.95)),
        )
        return dict(zip(MEASURES, values, strict=True))

    def check(self) -> None:
        """Raise ValueError if a request got another number of tokens than it asked for."""
        for request, stream in zip(self.requests, self.came, strict=True):
            if not len(stream["ids"]) == len(stream["times"]) == request.max_tokens:
                raise ValueError(f"{self.name} made {len(stream['ids'])} of {request.max_tokens}")

    def __str__(self) -> str:
        """One line for whoever waits."""
        line = f"round {self.number + 1}, {self.streams} streams, {self.name}"
        if self.name == ROOFLINE:
            return line
        waited = f"something waited for a core {self.answer['waited']:.0%} of the time"
        return f"{line}: {self.measures['tok_s']:.1f} tok/s; {waited}"


def summarise(
    records: list[Record],
    *,
    setup: dict[str, Any],
    load_s: dict[str, float],
    settings: dict[str, str],
) -> dict[str, Any]:
    """Take medians over the rounds; a ratio is the median of each round's own ratio."""
    runs = [record for record in records if record.name != ROOFLINE]
    for record in runs:
        record.check()
    machine = _machine_rates([r for r in records if r.name == ROOFLINE])
    by_turn = {(r.name, r.streams, r.number): r for r in runs}
    names = list(dict.fromkeys(record.name for record in runs))
    every_kv = max(sum(len(q.prompt) + q.max_tokens for q in r.requests) for r in runs) * int(
        machine["kv_bytes_per_token"]
    )
    contenders = {}
    for name in names:
        own = [record for record in runs if record.name == name]
        peak = max(record.answer["peak_bytes"] for record in own)
        contenders[name] = {
            "settings": settings[name],
            "load_s": load_s[name],
            "peak_bytes": peak,
            "peak_above_weights_and_kv_bytes": peak - int(machine["weights_bytes"]) - every_kv,
            "streams": {
                str(streams): _row(by_turn, name, streams, machine)
                for streams in sorted({record.streams for record in own})
            },
        }
    kept = ("dtype", "device", "threads", "rounds", "streams", "model")
    return {
        "machine": _machine(),
        "setup": {name: setup[name] for name in kept},
        "rates": machine,
        "contenders": contenders,
    }


def _row(
    turns: dict[tuple[str, int, int], Record], name: str, streams: int, machine: dict[str, float]
) -> dict[str, Any]:
    own = [r for (n, s, _), r in turns.items() if (n, s) == (name, streams)]
    row: dict[str, Any] = {
        measure: statistics.median(record.measures[measure] for record in own)
        for measure in MEASURES
    }
    row["rounds_tok_s"] = [record.measures["tok_s"] for record in own]
    row["rounds_waited"] = [record.answer["waited"] for record in own]
    row["of_bound"] = row["tok_s"] / _bound(own[0].requests, streams, machine)
    pairs = [(r, turns.get((OURS, streams, r.number))) for r in own]
    for measure in ("tok_s", "ttft_p50_s"):
        ratios = [p.measures[measure] / r.measures[measure] for r, p in pairs if p]
        row[f"ours_{measure}_ratio"] = statistics.median(ratios) if ratios else None
    same = [
        ours["ids"] == theirs["ids"]
        for record in own
        if (reference := turns.get((REFERENCE, streams, record.number)))
        for ours, theirs in zip(record.came, reference.came, strict=True)
    ]
    row["equal_to_generate"] = f"{sum(same)}/{len(same)}" if same else ""
    return row


def _bound(requests: list[Request], streams: int, machine: dict[str, float]) -> float:
    """Return the tokens a second that neither reading weights nor multiplying would allow."""
    tokens = [request.max_tokens for request in requests]
    processed = sum(len(request.prompt) for request in requests) + sum(tokens)
    flop = 2 * (machine["body_parameters"] * processed + machine["head_parameters"] * sum(tokens))
    steps = sum(tokens) if streams == 1 else max(tokens)
    bandwidth = max(machine["read_bytes_per_s"], machine["copy_bytes_per_s"])
    reading = steps * machine["weights_bytes"] / bandwidth
    return sum(tokens) / max(reading, flop / machine["flop_per_s"])


def _machine_rates(records: list[Record]) -> dict[str, float]:
    results = [record.answer["results"][0] for record in records]
    return {name: statistics.median(result[name] for result in results) for name in results[0]}


def cpu_features() -> list[str]:
    """Return what this CPU has of the instructions that matter here, the best first."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return [name for name in FEATURES if name in flags]


def _machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": found[0] if found else platform.machine(),
        "features": cpu_features(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values) or [0.0]
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def markdown(result: dict[str, Any]) -> str:
    """Return the machine and one table for each number of streams."""
    machine, setup, rates = result["machine"], result["setup"], result["rates"]
    how = "interleaved" if setup["device"] == "cpu" else "separate"
    lines = [
        f"# {setup['model']}, {setup['dtype']} on {setup['device']}",
        "",
        f"{machine['processor']} ({', '.join(machine['features'])}), {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {datetime.now(UTC):%Y-%m-%d}, "
        f"{setup['threads']} threads, torch {machine['torch']}, transformers "
        f"{machine['transformers']}; medians of {setup['rounds']} {how} "
        f"rounds. Measured in the same run: read {rates['read_bytes_per_s'] / 1e9:.1f} GB/s, copy "
        f"{rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, matrix product "
        f"{rates['flop_per_s'] / 1e9:.0f} GFLOP/s; weights {rates['weights_bytes'] / 1e6:.0f} MB.",
    ]
    head = (
        "| | tok/s | ours is | of bound | ttft p50 / p95 s | our ttft is | itl p50 / p95 ms "
        "| equals generate | RSS above weights and KV, MB |"
    )
    for streams in setup["streams"]:
        lines += ["", f"## Streams: {streams}", "", head, "|---" * 9 + "|"]
        for name, contender in result["contenders"].items():
            row = contender["streams"][str(streams)]
            above = contender["peak_above_weights_and_kv_bytes"] / 1e6
            lines.append(
                f"| {name} | {row['tok_s']:.1f} | {_times(row['ours_tok_s_ratio'])} "
                f"| {row['of_bound']:.0%} | {row['ttft_p50_s']:.3f} / {row['ttft_p95_s']:.3f} "
                f"| {_times(row['ours_ttft_p50_s_ratio'])} "
                f"| {row['itl_p50_s'] * 1e3:.1f} / {row['itl_p95_s'] * 1e3:.1f} "
                f"| {row['equal_to_generate']} | {above:.0f} |"
            )
    lines += ["", "## Settings", ""]
    lines += [f"- {name}: {c['settings']}" for name, c in result["contenders"].items()]
    return "\n".join(lines) + "\n"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f} ×"
