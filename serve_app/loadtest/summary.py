"""From samples to numbers: percentiles, rates, goodput, and whether the client could keep up.

Latencies are of requests that were meant to be sent inside the counted window (after the
warm-up) and were answered whole; everything else is an error, counted by its kind, and a miss
of the SLO. Rates are of what happened inside the window, whenever it was sent.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeAlias

import numpy as np

from serve_app.errors import ConfigError
from serve_app.loadtest.client import Sample
from serve_app.loadtest.workers import Ran

Json: TypeAlias = dict[str, Any]

PERCENTILES = (50, 90, 95, 99)
# A client this busy, or this late, measures itself.
BUSY_CPU_SHARE = 0.85
LATE_S = 0.02
LATE_SHARE_OF_TTFT = 0.1
_LIMIT = re.compile(r"(ttft|itl|tpot|e2e)=(\d+(?:\.\d+)?)(ms|s)")


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits in seconds; None does not matter.

    Args:
        ttft_s: of the first text.
        itl_s: of 95 % of the request's own gaps between texts.
        tpot_s: of the mean time of a token after the first.
        e2e_s: of the whole answer.
    """

    ttft_s: float | None = None
    itl_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Slo:
        """Read `ttft=500ms,itl=60ms`.

        Raises:
            ConfigError: it is not of this form.
        """
        limits: dict[str, float] = {}
        for part in text.split(","):
            match = _LIMIT.fullmatch(part.strip())
            if not match:
                raise ConfigError(f"{part!r} is not a limit; write --slo ttft=500ms,itl=60ms")
            limits[f"{match[1]}_s"] = float(match[2]) / (1000 if match[3] == "ms" else 1)
        return cls(**limits)

    def met(self, sample: Sample) -> bool:
        """Return whether a request was answered whole and within every limit."""
        if sample.error is not None:
            return False
        measured = times(sample)
        limits = ((f.name, getattr(self, f.name)) for f in fields(self))
        return all(
            limit is None or measured[name] is None or measured[name] <= limit
            for name, limit in limits
        )

    def to_json(self) -> dict[str, float | None]:
        """Return the limits by name."""
        return asdict(self)


def times(sample: Sample) -> dict[str, float | None]:
    """Return a request's own times in seconds; None for what it was too short to have."""
    gaps = sample.gaps_s
    return {
        "ttft_s": sample.ttft_s,
        "itl_s": float(np.quantile(gaps, 0.95)) if gaps else None,
        "tpot_s": sample.tpot_s,
        "e2e_s": sample.e2e_s,
    }


def summarise(ran: Ran, slo: Slo | None) -> Json:
    """Return one stage of the report."""
    stage, samples = ran.stage, sorted(ran.samples, key=lambda sample: sample.at_s)
    if ran.stopped_s is not None:  # what the interruption cut off says nothing of the server
        samples = [sample for sample in samples if sample.error != "unfinished"]
    end_s = min(stage.duration_s, ran.stopped_s or stage.duration_s)
    warmup_s = min(stage.warmup_s, end_s)
    counted = [sample for sample in samples if warmup_s <= sample.at_s < end_s]
    latency = _latencies([sample for sample in counted if sample.error is None])
    return {
        "name": stage.name,
        "loop": "open" if stage.concurrency is None else "closed",
        "rate": stage.rate,
        "concurrency": stage.concurrency,
        "duration_s": end_s,
        "warmup_s": warmup_s,
        "requests": len(counted),
        "completed": sum(sample.error is None for sample in counted),
        "errors": dict(Counter(sample.error for sample in counted if sample.error)),
        "latency": latency,
        **_rates(samples, warmup_s, end_s),
        "goodput": _goodput(counted, slo, end_s - warmup_s),
        "client": _client(ran, counted, latency["ttft_s"]),
        "samples": _columns(counted),
        "seconds": _seconds(samples, end_s),
    }


def _latencies(samples: Sequence[Sample]) -> Json:
    measured = [times(sample) for sample in samples]
    pools: dict[str, list[float]] = {
        name: [v for row in measured if (v := row[name]) is not None]
        for name in ("ttft_s", "tpot_s", "e2e_s")
    }
    pools["itl_s"] = [gap for sample in samples for gap in sample.gaps_s]
    return {name: _spread(pools[name]) for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s")}


def _spread(values: Sequence[float]) -> Json | None:
    """Return mean, largest, percentiles and a distribution of 101 points; None of nothing."""
    if not values:
        return None
    array = np.asarray(values)
    named = dict(zip(PERCENTILES, np.percentile(array, PERCENTILES), strict=True))
    return {
        "count": len(values),
        "mean": _round(array.mean()),
        **{f"p{rank}": _round(value) for rank, value in named.items()},
        "max": _round(array.max()),
        "cdf": [_round(value) for value in np.percentile(array, range(101))],
    }


def _rates(samples: Sequence[Sample], start_s: float, end_s: float) -> Json:
    length = max(end_s - start_s, 1e-9)
    ended = [s for s in samples if s.error is None and start_s <= s.end_s < end_s]
    tokens = sum(s.output_tokens * _share(s.first_s, s.end_s, start_s, end_s) for s in samples)
    flying = sum(_overlap(s.at_s, s.end_s, start_s, end_s) for s in samples)
    return {
        "req_s": _round(len(ended) / length),
        "output_tok_s": _round(tokens / length),
        "prompt_tok_s": _round(sum(s.prompt_tokens for s in ended) / length),
        "in_flight": _round(flying / length),
    }


def _goodput(counted: Sequence[Sample], slo: Slo | None, length: float) -> Json | None:
    if slo is None:
        return None
    good = sum(map(slo.met, counted))
    share = good / len(counted) if counted else None
    return {"good": good, "share": share, "req_s": _round(good / max(length, 1e-9))}


def _client(ran: Ran, counted: Sequence[Sample], ttft: Json | None) -> Json:
    """Report the client's own strain, and whether it spoils the numbers."""
    cpu = max((strain.cpu_share for strain in ran.strains), default=0.0)
    lag = _p99(lag for strain in ran.strains for lag in strain.lags_s)
    late = _p99(sample.sent_s - sample.at_s for sample in counted)
    limit = max(LATE_S, LATE_SHARE_OF_TTFT * (ttft["p50"] if ttft else 0.0))
    reasons = []
    if cpu > BUSY_CPU_SHARE:
        reasons.append(f"a client process used {cpu:.0%} of a core")
    if max(lag, late) > limit:
        reasons.append(f"the client was up to {max(lag, late) * 1000:.0f} ms late (p99)")
    return {
        "processes": len(ran.strains),
        "cpu_share_max": _round(cpu),
        "loop_lag_p99_s": _round(lag),
        "send_lag_p99_s": _round(late),
        "bottleneck": bool(reasons),
        "reasons": reasons,
    }


def _p99(values: Iterable[float]) -> float:
    listed = list(values)
    return float(np.percentile(listed, 99)) if listed else 0.0


def _columns(counted: Sequence[Sample]) -> Json:
    """Every counted request, a list for each quantity: what comparisons are made from."""
    measured = [times(sample) for sample in counted]
    columns: Json = {"at_s": [_round(sample.at_s) for sample in counted]}
    for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s"):
        columns[name] = [None if row[name] is None else _round(row[name]) for row in measured]
    columns["prompt_tokens"] = [sample.prompt_tokens for sample in counted]
    columns["output_tokens"] = [sample.output_tokens for sample in counted]
    columns["error"] = [sample.error for sample in counted]
    return columns


def _seconds(samples: Sequence[Sample], end_s: float) -> Json:
    """What happened in each second, warm-up included, as the client saw it."""
    count = max(1, int(np.ceil(end_s)))
    tokens, flying, ended = np.zeros(count), np.zeros(count), np.zeros(count)
    for sample in samples:
        first = sample.end_s if sample.first_s is None else sample.first_s
        for second in range(max(0, int(sample.at_s)), min(count, int(sample.end_s) + 1)):
            share = _share(first, sample.end_s, second, second + 1)
            tokens[second] += sample.output_tokens * share
            flying[second] += _overlap(sample.at_s, sample.end_s, second, second + 1)
        if sample.error is None and sample.end_s < count:
            ended[int(sample.end_s)] += 1
    return {
        "output_tokens": [_round(value) for value in tokens],
        "in_flight": [_round(value) for value in flying],
        "completed": [int(value) for value in ended],
    }


def _share(first_s: float | None, end_s: float, low: float, high: float) -> float:
    """Return which share of a steady stream of tokens falls between two times."""
    if first_s is None:
        return 0.0
    if end_s <= first_s:
        return float(low <= first_s < high)
    return _overlap(first_s, end_s, low, high) / (end_s - first_s)


def _overlap(start: float, end: float, low: float, high: float) -> float:
    return max(0.0, min(end, high) - max(start, low))


def _round(value: Any) -> float:
    return round(float(value), 6)
