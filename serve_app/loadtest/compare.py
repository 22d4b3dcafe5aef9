"""The regression gate: is the second report worse than the first?

A gate that flaps is switched off, and percentiles of one run flap: requests that queue behind
each other are not independent, so their usual error bars are far too short. Here the error
bars come from a block bootstrap: whole stretches of the run are drawn again and again, and
each draw gives one change. A quantity has regressed when the *whole*
interval of its change lies beyond the threshold; that happens by chance in at most 1 % of
comparisons whose true change is not beyond it. An interval that straddles the threshold is
reported as `unclear` and passes: run longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from serve_app.errors import ConfigError
from serve_app.loadtest.summary import Json

Column: TypeAlias = NDArray[np.float64]

BLOCKS = 20
DRAWS = 1000
AT_ONCE = 4_000_000  # values of a draw in memory
INTERVAL = (1.0, 99.0)  # one-sided 1 %
# Of a share (errors, misses of the SLO) a percentage of itself says little: points count.
SHARE_THRESHOLD = 0.02
MIN_REQUESTS = 40


@dataclass(frozen=True, slots=True)
class Change:
    """How one quantity of one stage changed.

    Args:
        stage: its name.
        quantity: its name.
        before: in the first report.
        after: in the second.
        low: of the change's interval; positive is worse, 0.1 is 10 % or 10 points.
        high: of the interval.
        verdict: `regressed`, `unclear` or `ok`.
    """

    stage: str
    quantity: str
    before: float
    after: float
    low: float
    high: float
    verdict: str


def compare(before: Json, after: Json, *, threshold: float) -> list[Change]:
    """Compare two reports, stage by stage.

    Args:
        before: the report to hold against.
        after: the report to judge.
        threshold: tolerated change for the worse, 0.1 is 10 %.

    Raises:
        ConfigError: they measured different things, too little, or the client was the
            bottleneck.
    """
    faults = list(_faults(before, after))
    if faults:
        raise ConfigError("the reports cannot be compared:\n" + "\n".join(faults))
    pairs = zip(before["stages"], after["stages"], strict=True)
    return [change for pair in pairs for change in _changes(*pair, threshold=threshold)]


def _faults(before: Json, after: Json) -> Iterator[str]:
    names = [[stage["name"] for stage in report["stages"]] for report in (before, after)]
    if names[0] != names[1]:
        yield f"their stages differ: {', '.join(names[0])} against {', '.join(names[1])}"
    for key in ("model", "load", "slo"):
        if before[key] != after[key]:
            yield f"their {key} differs: {before[key]} against {after[key]}"
    for title, report in (("first", before), ("second", after)):
        for stage in report["stages"]:
            if stage["client"]["bottleneck"]:
                yield f"{title}: {stage['name']}: the client was the bottleneck"
            if stage["requests"] < MIN_REQUESTS:
                yield f"{title}: {stage['name']}: fewer than {MIN_REQUESTS} requests"


def _changes(before: Json, after: Json, *, threshold: float) -> Iterator[Change]:
    rng = np.random.default_rng(0)  # the same two files get the same verdict
    for name, draw in _quantities():
        first, second = draw(before), draw(after)
        if first is None or second is None:
            continue
        change = _worse(_bootstrap(first, rng), _bootstrap(second, rng), first.kind)
        low, high = (float(value) for value in np.percentile(change, INTERVAL))
        limit = SHARE_THRESHOLD if first.kind == "share" else threshold
        verdict = "regressed" if low > limit else "unclear" if high > limit else "ok"
        yield Change(before["name"], name, first.plain, second.plain, low, high, verdict)


@dataclass(frozen=True, slots=True)
class _Series:
    """Values in the order of time, the number that counts along an axis, and its kind."""

    values: Column
    statistic: Callable[[Column], Column]
    kind: str

    @property
    def plain(self) -> float:
        return float(self.statistic(self.values))


def _quantities() -> Iterator[tuple[str, Callable[[Json], _Series | None]]]:
    for name in ("ttft_s", "itl_s", "tpot_s", "e2e_s"):
        for rank in (50, 95):
            yield f"{name} p{rank}", _latency(name, rank)
    yield "output_tok_s", _throughput
    yield "failed_share", _failed


def _latency(name: str, rank: int) -> Callable[[Json], _Series | None]:
    def column(stage: Json) -> _Series | None:
        samples = stage["samples"]
        rows = zip(samples[name], samples["error"], strict=True)
        values = [value for value, error in rows if value is not None and error is None]
        if len(values) < MIN_REQUESTS:
            return None
        return _Series(np.asarray(values), lambda v: np.percentile(v, rank, axis=-1), "time")

    return column


def _throughput(stage: Json) -> _Series | None:
    whole = slice(int(np.ceil(stage["warmup_s"])), int(stage["duration_s"]))
    seconds = np.asarray(stage["seconds"]["output_tokens"][whole], dtype=np.float64)
    return _Series(seconds, _mean, "rate") if len(seconds) >= BLOCKS else None


def _failed(stage: Json) -> _Series:
    failed = np.asarray([error is not None for error in stage["samples"]["error"]], np.float64)
    return _Series(failed, _mean, "share")


def _mean(values: Column) -> Column:
    return np.asarray(values.mean(axis=-1))


def _bootstrap(series: _Series, rng: np.random.Generator) -> Column:
    """Return the statistic of draws of whole stretches, shape (DRAWS,).

    Source: circular block bootstrap, Politis and Romano 1992.
    """
    count = len(series.values)
    length = -(-count // BLOCKS)
    starts = rng.integers(0, count, size=(DRAWS, BLOCKS, 1))
    parts = np.array_split(starts, 1 + DRAWS * count // AT_ONCE)
    drawn = ((part + np.arange(length)).reshape(len(part), -1) % count for part in parts)
    return np.concatenate([series.statistic(series.values[indices]) for indices in drawn])


def _worse(before: Column, after: Column, kind: str) -> Column:
    """Return the change for the worse: a ratio less one, of a share its points."""
    if kind == "share":
        return after - before
    small = 1e-9
    up, down = (after, before) if kind == "time" else (before, after)
    return up / np.maximum(down, small) - 1
