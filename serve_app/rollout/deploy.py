"""`serve-app deploy`: after the gate, apply a config, watch it, ask it, and go back if it fails.

Serve alone has no time limit of a build, says RUNNING before anybody asked, and after a failed
build leaves the old version without autoscaling, even when the old file is applied again
unchanged (Ray 2.60). So a rollback here changes one delay of the autoscaler by less than a
tenth of a second, which registers it anew and restarts nothing.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.config import parse_args
from serve_app.deployments.autoscaling import autoscaling
from serve_app.errors import ConfigError
from serve_app.rollout.diff import by_name
from serve_app.rollout.progress import Progress
from serve_app.rollout.serve_client import AppState
from serve_app.serve_config import CANARY_IMPORT_PATH, IMPORT_PATH, SERVER_DEPLOYMENT
from serve_app.telemetry.cold_start import Phase

POLL_S = 0.5
FAILED = frozenset({"DEPLOY_FAILED", "UNHEALTHY"})
OURS = frozenset({IMPORT_PATH, CANARY_IMPORT_PATH})
UPSCALE_DELAY_S = 30.0  # Serve's default
NUDGE_S = (0.01, 0.1)


class Serving(Protocol):
    """What a rollout needs of Serve; see `Instance`."""

    def goal(self) -> dict[str, Any] | None: ...  # noqa: D102
    def apply(self, goal: dict[str, Any]) -> None: ...  # noqa: D102
    def states(self) -> dict[str, AppState]: ...  # noqa: D102
    def phases(self, name: str) -> dict[str, Phase]: ...  # noqa: D102
    def ask(self, name: str) -> str | None: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Result:
    """How a rollout ended.

    Args:
        status: `done`, `rolled_back` or `failed`; of a canary `held`, which stays as it is, or
            `undecided`, which does so because nobody knows whether it is good.
        reason: why not `done`; empty if it is.
        duration_s: from the gate's yes to the end.
    """

    status: str
    reason: str
    duration_s: float

    @property
    def exit_code(self) -> int:
        """0 if the new version serves as it should, 4 if nobody knows, else 5."""
        return {"done": 0, "held": 0, "undecided": 4}.get(self.status, 5)


@dataclass(frozen=True, slots=True)
class _Before:
    """What Serve said before the goal was set; compared, as no two machines' clocks agree."""

    states: Mapping[str, AppState]
    phases: Mapping[str, Mapping[str, Phase]]


def deploy(
    serving: Serving,
    goal: dict[str, Any],
    *,
    timeout_s: float,
    former: dict[str, Any] | None,
    names: Collection[str] | None = None,
) -> Result:
    """Apply a config whose access was proven, and make sure that it serves.

    Args:
        serving: Serve.
        goal: all applications that are to serve.
        timeout_s: until every application runs, and again for a rollback, in seconds.
        former: what to go back to if it does not serve; None leaves it as it failed.
        names: the applications that are looked after; None for all. How others fare is theirs.
    """
    began = time.monotonic()
    names = by_name(goal).keys() if names is None else names
    reason = _put(serving, goal, names, timeout_s)
    if reason is None:
        return Result("done", "", time.monotonic() - began)
    _say(f"failed: {reason}")
    if former is None:
        return Result("failed", reason, time.monotonic() - began)
    _say("going back to the config that served before")
    again = _put(serving, nudged(former, names), names, timeout_s)
    if again is not None:
        reason = f"{reason}; and the former config does not come back: {again}"
    return Result("rolled_back" if again is None else "failed", reason, time.monotonic() - began)


def _put(
    serving: Serving, goal: dict[str, Any], names: Collection[str], timeout_s: float
) -> str | None:
    """Apply a config and wait until its named applications serve; returns what went wrong."""
    asked = {name: app for name, app in by_name(goal).items() if name in names}
    before = _Before(serving.states(), {name: serving.phases(name) for name in asked})
    serving.apply(goal)
    return _settle(serving, asked, before, timeout_s)


def nudged(goal: dict[str, Any], names: Collection[str] | None = None) -> dict[str, Any]:
    """Return a config that does the same but is not the same, where autoscaling needs it.

    Args:
        goal: the config.
        names: the applications to change; None for all.

    The change is drawn by chance: what served before the failed build may have been nudged too,
    and a fixed one from the same old file would make the very same config again.
    """
    goal = copy.deepcopy(goal)
    for name, app in by_name(goal).items():
        if app.get("import_path") != IMPORT_PATH or (names is not None and name not in names):
            continue
        replica = parse_args(app.get("args") or {}).replica
        if replica.min_replicas == replica.max_replicas:
            continue
        deployments = app["deployments"] = app.get("deployments") or []
        if SERVER_DEPLOYMENT not in {deployment["name"] for deployment in deployments}:
            deployments.append({"name": SERVER_DEPLOYMENT})
        server = next(d for d in deployments if d["name"] == SERVER_DEPLOYMENT)
        # Whole, because it takes the place of what the application says by itself.
        scaling = server["autoscaling_config"] = server.get("autoscaling_config") or autoscaling(
            replica
        )
        delay_s = scaling.get("upscale_delay_s", UPSCALE_DELAY_S)
        if 0 < delay_s - replica.upscale_delay_s < NUDGE_S[1]:
            delay_s = replica.upscale_delay_s  # nudged before: nudges do not add up
        nudge_s = random.uniform(*NUDGE_S)  # noqa: S311 (no secret)
        scaling["upscale_delay_s"] = round(delay_s + nudge_s, 6)
    return goal


def report(result: Result, *, as_json: bool) -> int:
    """Print how it ended and return the exit code."""
    if as_json:
        facts = {"status": result.status, "reason": result.reason}
        print(json.dumps({**facts, "duration_s": round(result.duration_s, 1)}))
    else:
        words = {
            "done": "done: every application runs and answered",
            "rolled_back": "rolled back: the config that served before serves again",
            "failed": "failed",
            "held": "the canary stays at its share",
            "undecided": "not decided: the canary stays at its share",
        }
        print(f"{words[result.status]}, {result.duration_s:.0f} s")
        if result.reason:
            print(result.reason)
    return result.exit_code


def _settle(
    serving: Serving,
    asked: Mapping[str, dict[str, Any]],
    before: _Before,
    timeout_s: float,
) -> str | None:
    """Wait until the applications run and answer; returns what went wrong."""
    deadline = time.monotonic() + timeout_s
    waiting = set(asked)
    shown: dict[str, AppState] = {}
    progress = Progress()
    while waiting:
        _print_phases(serving, waiting, progress, before.phases)
        for name, state in _states(serving).items():
            old = before.states.get(name)
            if name not in waiting or (old and state.deployed_s == old.deployed_s):
                continue  # still the state of the goal before
            if shown.get(name) != state:
                shown[name] = state
                _say(f"{name}: {state.status} {''.join(state.message.splitlines()[-1:])}".rstrip())
            if state.status in FAILED:
                return f"{name} is {state.status}: {state.message}"
            if state.status == "RUNNING":
                waiting.remove(name)
        if waiting and time.monotonic() > deadline:
            return f"not running within {timeout_s:.0f} s: {', '.join(sorted(waiting))}"
        time.sleep(POLL_S if waiting else 0)
    return _ask_all(serving, asked)


def _states(serving: Serving) -> dict[str, AppState]:
    """Ask Serve; a controller that restarts meanwhile is asked again until the time is over."""
    try:
        return serving.states()
    except ConfigError as error:
        _say(error.message)
        return {}


def _print_phases(
    serving: Serving,
    names: set[str],
    progress: Progress,
    before: Mapping[str, Mapping[str, Phase]],
) -> None:
    for name in sorted(names):
        old = before[name]
        phases = serving.phases(name).items()
        new = {replica: phase for replica, phase in phases if old.get(replica) != phase}
        for line in progress.lines(new):
            _say(f"{name}: {line}")


def _ask_all(serving: Serving, asked: Mapping[str, dict[str, Any]]) -> str | None:
    for name, app in asked.items():
        replica = (app.get("args") or {}).get("replica") or {}
        if app.get("import_path") not in OURS or replica.get("min_replicas", 1) == 0:
            continue  # somebody else's, or asleep until the first request
        if fault := serving.ask(name):
            return f"{name} runs but does not answer: {fault}"
        _say(f"{name}: answered")
    return None


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
