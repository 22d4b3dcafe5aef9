"""Whether a canary does as well as the version that serves: what `--slo` says, and what was seen.

Every limit has one form: of `n` requests no more than a certain share may be bad. `ttft_p95=1s`
calls a first token after more than a second bad, and lets 5 % be so; `ttft_p95=1.5x` does the same
with half as much again as the serving version's own p95; `error_rate` counts errors.

A step ends with what was seen. Before, a canary is taken back when what was seen would come about
by chance once in a thousand steps if it kept the limit (the tail of the binomial distribution).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from serve_app.deployments.canary import Report, Seen, Sketch
from serve_app.errors import ConfigError

SURE = 0.001
# So much more than the serving version's is no difference: a clock's tick, another process' turn.
NOISE_S = {"ttft": 0.02, "tpot": 0.002}
MORE_ERRORS = 0.01
_LIMIT = re.compile(r"(?P<what>ttft|tpot)_p(?P<percent>50|90|95|99)|error_rate")
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)(ms|s)")
_TIMES = re.compile(r"(\d+(?:\.\d+)?)x")
_SHARE = re.compile(r"(\d+(?:\.\d+)?)%")


@dataclass(frozen=True, slots=True)
class Limit:
    """One limit.

    Args:
        name: as `--slo` has it, for people.
        what: `ttft`, `tpot` or `error`.
        allowed: share of the requests that may be bad; of errors, where `relative`, how much more
            than the serving version's.
        over_s: seconds from which a time is bad; None takes `times`.
        times: the serving version's own time, multiplied by this, in place of seconds.
        relative: it compares with the serving version.
    """

    name: str
    what: str
    allowed: float
    over_s: float | None = None
    times: float | None = None
    relative: bool = False


# What counts besides `--slo`, unless that has the same name with another factor.
AGAINST_STABLE = (
    Limit("ttft_p95=1.5x", "ttft", 0.05, times=1.5, relative=True),
    Limit("tpot_p95=1.5x", "tpot", 0.05, times=1.5, relative=True),
    Limit("error_rate=+1%", "error", MORE_ERRORS, relative=True),
)


def parse_slo(text: str) -> tuple[Limit, ...]:
    """Read `ttft_p95=1s,error_rate=0.5%`; what is compared with the serving version is added.

    Args:
        text: limits between commas: `ttft` (time to the first token) and `tpot` (seconds a token
            after it) at p50, p90, p95 or p99 in `s`, `ms` or `x`, times the serving version's;
            `error_rate` in `%`, or in `+%`, more than the serving version's.

    Raises:
        ConfigError: none of these.
    """
    own = tuple(_limit(part.strip()) for part in text.split(",") if part.strip())
    named = {_key(limit) for limit in own}
    return *own, *(limit for limit in AGAINST_STABLE if _key(limit) not in named)


def _key(limit: Limit) -> tuple[str, bool]:
    return limit.name.partition("=")[0], limit.relative


def _limit(text: str) -> Limit:
    name, _, value = text.partition("=")
    known = _LIMIT.fullmatch(name)
    if known and known["what"]:
        allowed = round(1 - int(known["percent"]) / 100, 2)
        if seconds := _SECONDS.fullmatch(value):
            over_s = float(seconds[1]) / (1000 if seconds[2] == "ms" else 1)
            return Limit(text, known["what"], allowed, over_s=over_s)
        if times := _TIMES.fullmatch(value):
            return Limit(text, known["what"], allowed, times=float(times[1]), relative=True)
    elif known and (share := _SHARE.fullmatch(value.removeprefix("+"))):
        return Limit(text, "error", float(share[1]) / 100, relative=value.startswith("+"))
    raise ConfigError(
        f"--slo {text}: write ttft_p95=1s, tpot_p50=50ms, ttft_p95=1.5x (times what the serving "
        "version takes), error_rate=0.5% or error_rate=+1% (more than the serving version)"
    )


def faults(report: Report, limits: Sequence[Limit], *, surely: bool, least: int = 0) -> list[str]:
    """Return the limits that a canary does not keep, each with its numbers.

    Args:
        report: what was seen in this step.
        limits: that count.
        surely: those alone that chance does not explain.
        least: times that have to be known. Of fewer of the serving version's nothing follows; of
            fewer of the canary's what chance does not explain: most answers may have one token,
            and no time after it.
    """
    return [
        words for limit in limits for words in _fault(report, limit, surely=surely, least=least)
    ]


def _fault(report: Report, limit: Limit, *, surely: bool, least: int) -> Iterator[str]:
    new, old = report.canary, report.stable
    allowed = limit.allowed
    if limit.what == "error":
        bad, total = new.failed, new.requests
        if limit.relative:
            allowed += old.failed / max(1, old.requests)
        found = f"{bad} of {total} requests failed"
        beside = f"{old.failed} of {old.requests}"
    else:
        over_s = limit.over_s if limit.over_s is not None else _over(limit, old)
        if over_s is None or (limit.relative and _times(limit, old).count < least):
            return  # the serving version has answered nothing yet, or too little
        times = _times(limit, new)
        late = new.waiting.over(over_s) if limit.what == "ttft" else 0
        bad, total = times.over(over_s) + late, times.count + late
        surely = surely or total < least
        found = f"{bad} of {total} took more than {over_s:.3g} s, at the most {allowed:.0%} may"
        beside = f"p{100 * (1 - allowed):.0f} {_shown(_times(limit, old).quantile(1 - allowed))}"
    if not total:
        return
    if chance(bad, total, allowed) < SURE if surely else bad > allowed * total:
        yield f"{limit.name}: {found}; the serving version has {beside}"


def _over(limit: Limit, old: Seen) -> float | None:
    value = _times(limit, old).quantile(1 - limit.allowed)
    if value is None or limit.times is None:
        return None
    return max(value * limit.times, value + NOISE_S[limit.what])


def _times(limit: Limit, seen: Seen) -> Sketch:
    return seen.first if limit.what == "ttft" else seen.token


def chance(bad: int, total: int, allowed: float) -> float:
    """Return how likely it is that so many of `total` or more are bad, if each is by `allowed`."""
    if bad <= 0 or allowed >= 1:
        return 1.0
    if allowed <= 0:
        return 0.0
    if bad <= allowed * total:
        return 1.0  # not unlikely, however likely exactly
    odds = allowed / (1 - allowed)
    term = math.exp(
        math.lgamma(total + 1)
        - math.lgamma(bad + 1)
        - math.lgamma(total - bad + 1)
        + bad * math.log(allowed)
        + (total - bad) * math.log1p(-allowed)
    )
    sum_ = 0.0
    for count in range(bad, total + 1):  # each term is smaller than the one before
        sum_ += term
        term *= (total - count) / (count + 1) * odds
        if term < sum_ * 1e-9:
            break
    return sum_


def summary(report: Report) -> str:
    """Return both versions' numbers in one line."""
    return f"canary {_numbers(report.canary)}; serving version {_numbers(report.stable)}" + (
        f"; {report.canary.dropped} copies left out" if report.canary.dropped else ""
    )


def _numbers(seen: Seen) -> str:
    return (
        f"{seen.requests} requests, ttft p50 {_shown(seen.first.quantile(0.5))} "
        f"p95 {_shown(seen.first.quantile(0.95))}, tpot p95 {_shown(seen.token.quantile(0.95))}, "
        f"{seen.failed} errors"
    )


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g} s"
