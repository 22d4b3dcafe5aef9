"""A release in steps: a canary beside an application, its share, and whether it keeps it.

The canary is an application of its own, `NAME-canary`, with replicas and without a route. What
its share is stands in the cluster and not in the command, so that a command that ends changes
nothing, and the next one goes on from there.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

from serve_app.deployments.canary import SUFFIX, Report
from serve_app.errors import ConfigError
from serve_app.rollout.judge import Limit, faults, summary
from serve_app.serve_config import CANARY_IMPORT_PATH, SERVER_DEPLOYMENT

POLL_S = 0.5
SHOW_S = 15.0  # between two lines about a step
# Until an ingress has said that it knows the step. It looks once a second.
TAKEN_S = 20.0
# Fields of a deployment's override that say how many replicas there are.
SCALE = frozenset({"num_replicas", "autoscaling_config"})


@dataclass(frozen=True, slots=True)
class Step:
    """One step: shares from 0 to 1; what is copied is none that the canary answers."""

    share: float
    shadow: float = 0.0

    @property
    def words(self) -> str:
        """Return it for people."""
        copied = f"copies of {100 * self.shadow:.4g} %"
        if not self.share:
            return copied
        return f"{100 * self.share:.4g} %" + (f" and {copied}" if self.shadow else "")


@dataclass(frozen=True, slots=True)
class Rules:
    """How a step is judged.

    Args:
        limits: see `judge`.
        hold_s: how long a step lasts.
        least: requests of each version that a judgement needs.
        patience_s: how much longer a step waits for them.
    """

    limits: tuple[Limit, ...]
    hold_s: float
    least: int
    patience_s: float


@dataclass(frozen=True, slots=True)
class Judged:
    """How a step ended.

    Args:
        verdict: `good`; `bad`, so the canary has to go; `few`, so nobody knows; `gone`, because
            somebody else has taken the canary back or gone on with it.
        words: why, with the numbers.
        duration_s: of the step.
    """

    verdict: str
    words: str
    duration_s: float


class Trial(Protocol):
    """What a step needs of the cluster."""

    def begin(self, step: Step) -> None: ...  # noqa: D102
    def report(self) -> Report | None: ...  # noqa: D102
    def fault(self) -> str | None: ...  # noqa: D102


def run_step(
    trial: Trial,
    step: Step,
    rules: Rules,
    say: Callable[[str], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Judged:
    """Give a canary its share for a while and judge it.

    Args:
        trial: the cluster: `begin` sets the shares; `report` returns what was seen since, None
            where the step is not this one any more; `fault` says why the canary does not run.
        step: the shares.
        rules: of the judgement.
        say: prints a line.
        clock: monotonic seconds.
        sleep: for so many of them.
    """
    began = shown = clock()
    taken_at = None
    trial.begin(step)
    while True:
        sleep(POLL_S)
        now = clock()
        report = trial.report()
        if taken_at is None and report is not None and report.ingresses:
            taken_at = now
        held_s = None if taken_at is None else now - taken_at
        found = _outside(report, trial, now - began) or _judged(report, rules, held_s)
        if found is not None:
            return Judged(*found, now - began)
        if report is not None and held_s is not None and now - shown >= SHOW_S:
            shown = now
            say(f"{step.words}, {held_s:.0f} s of {rules.hold_s:.0f} s: {summary(report)}")


def _outside(report: Report | None, trial: Trial, waited_s: float) -> tuple[str, str] | None:
    """Return what ends a step whatever was seen in it: verdict and words."""
    if report is None:
        return "gone", "somebody else has changed the canary's share"
    if fault := trial.fault():
        return "bad", fault
    if not report.ingresses and waited_s > TAKEN_S:
        return "bad", (
            f"no ingress has taken the share within {TAKEN_S:.0f} s; those that an older version "
            "of this package deployed cannot: deploy once without --canary"
        )
    return None


def _judged(report: Report | None, rules: Rules, held_s: float | None) -> tuple[str, str] | None:
    """Return the verdict by what was seen, and its words; None if it is too early."""
    if report is None or held_s is None:
        return None
    enough = min(report.canary.requests, report.stable.requests) >= rules.least
    is_silent = report.unready == report.ingresses  # whatever it answered before
    over = enough and held_s >= rules.hold_s and not is_silent
    found = (
        faults(report, rules.limits, surely=False, least=rules.least)
        if over
        else _for_sure(report, rules)
    )
    if found or over:
        return "bad" if found else "good", _why(found, report)
    if held_s < rules.hold_s + rules.patience_s:
        return None
    if is_silent:
        return "bad", _why(["the canary does not answer any ingress"], report)
    few = f"too few requests: a judgement needs {rules.least} of each version"
    return "few", _why([few], report)


def _for_sure(report: Report, rules: Rules) -> list[str]:
    compared = report.stable.requests >= rules.least
    limits = [limit for limit in rules.limits if compared or not limit.relative]
    return faults(report, limits, surely=True, least=rules.least)


def _why(found: Sequence[str], report: Report) -> str:
    return "; ".join([*found, summary(report)])


def parse_steps(text: str) -> tuple[Step, ...]:
    """Read the steps `5,25,100`, in percent.

    Raises:
        ConfigError: they are no numbers above 0 and up to 100, or do not grow.
    """
    shares = [_share(part) for part in text.split(",")]
    if not all(low < high for low, high in pairwise([0.0, *shares])) or shares[-1] > 1:
        raise ConfigError(f"--canary {text}: write growing percents, from above 0: 5,25,100")
    return tuple(Step(share) for share in shares)


def parse_shadow(text: str) -> Step:
    """Read the share of `--shadow`, in percent.

    Raises:
        ConfigError: it is no number above 0 and up to 100.
    """
    if not 0 < (share := _share(text)) <= 1:
        raise ConfigError(f"--shadow {text}: write a percent from above 0: 10")
    return Step(0.0, share)


def _share(text: str) -> float:
    try:
        return float(text.strip().removesuffix("%")) / 100
    except ValueError:
        return 0.0


def canary_of(app: Mapping[str, Any], replicas: int) -> dict[str, Any]:
    """Return the application that tries a version beside the one that serves.

    Args:
        app: the version as its file has it.
        replicas: how many replicas it gets, whatever the file says.
    """
    canary = copy.deepcopy(dict(app))
    canary["name"] = f"{app.get('name', 'default')}{SUFFIX}"
    canary["import_path"] = CANARY_IMPORT_PATH
    canary["route_prefix"] = None
    args = canary["args"] = canary.get("args") or {}
    scale = {"min_replicas": replicas, "max_replicas": replicas}
    args["replica"] = {**(args.get("replica") or {}), **scale}
    deployments = [
        {key: value for key, value in each.items() if key not in SCALE}
        for each in canary.pop("deployments", None) or ()
        if each["name"] == SERVER_DEPLOYMENT
    ]
    if any(len(each) > 1 for each in deployments):
        canary["deployments"] = deployments
    return canary


def without(goal: dict[str, Any] | None, name: str | None) -> dict[str, Any] | None:
    """Return what serves without one of its applications; None if nothing does."""
    if goal is None or name is None:
        return goal
    kept = [app for app in goal["applications"] if app.get("name", "default") != name]
    return {**goal, "applications": kept}
