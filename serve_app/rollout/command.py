"""The commands `deploy` and `rollback` after the gate: connect, show the plan, roll out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ray

from serve_app import tally
from serve_app.access.placement import find_cluster
from serve_app.access.report import sanitise
from serve_app.access.verdict import Verdict
from serve_app.errors import ConfigError
from serve_app.rollout import history
from serve_app.rollout.changes import by_name, changes
from serve_app.rollout.deploy import FAILED, deploy, nudged, report
from serve_app.rollout.instance import Instance
from serve_app.rollout.plan import needs
from serve_app.rollout.turn import turn
from serve_app.serve_config import IMPORT_PATH, ServedApp
from serve_app.tally import Result


@dataclass(frozen=True, slots=True)
class Options:
    """How a rollout is watched and told.

    Args:
        timeout_s: limit of the rollout, and of going back, in seconds.
        as_json: print one JSON object at the end.
        dry_run: show the plan alone.
    """

    timeout_s: float
    as_json: bool = False
    dry_run: bool = False


def run(
    goal: dict[str, Any],
    apps: Sequence[ServedApp],
    verdicts: Mapping[str, Verdict],
    options: Options,
) -> int:
    """Show what a config does on the connected cluster, and roll it out.

    Args:
        goal: the config file's content.
        apps: our applications in it.
        verdicts: what the gate said of each, all granted.
        options: how.

    Returns:
        The exit code: 0 the new version serves, 5 it does not.

    Raises:
        ConfigError: another rollout is under way.
    """
    serving = Instance(goal)
    for line in changes(serving.goal(), goal):
        _say(line)
    for app in apps:
        for line in needs(app, verdicts[app.name]):
            _say(line)
    if options.dry_run:
        return 0
    with turn():
        before = serving.goal()
        if FAILED & {state.status for state in serving.states().values()}:
            good = history.former(before)
            before = good.goal if good else before
        return _roll(serving, goal, before, options)


def blocked(code: int, verdicts: Mapping[str, Verdict]) -> int:
    """Count a rollout that ended at the gate, on the connected cluster.

    Args:
        code: the gate's exit code.
        verdicts: by the name of the application.

    Returns:
        The exit code.
    """
    for name, verdict in verdicts.items():
        if not verdict.approved:
            tally.note(name, Result.BLOCKED, duration_s=verdict.duration_s)
    return code


def former() -> history.Good:
    """Return the newest config that served well on the connected cluster and does not now.

    Raises:
        ConfigError: none is remembered.
    """
    entries = history.read()
    good = history.former(Instance(entries[-1].goal).goal()) if entries else None
    if good is None:
        raise ConfigError("no earlier config that served is remembered; deploy one instead")
    return good


def roll_back(good: history.Good, options: Options) -> int:
    """Go back to a config on the connected cluster.

    Args:
        good: what `former` returned, after the gate: what was readable once need not be today.
        options: how.

    Returns:
        As `run`; what fails here is left as it failed.

    Raises:
        ConfigError: another rollout is under way.
    """
    since = datetime.fromtimestamp(good.since, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    _say(f"going back to the config that served since {since}")
    with turn():
        code = _roll(Instance(good.goal), nudged(good.goal), None, options)
        if code == 0:
            history.replace(good)
    return code


def _roll(
    serving: Instance, goal: dict[str, Any], before: dict[str, Any] | None, options: Options
) -> int:
    result = deploy(serving, goal, timeout_s=options.timeout_s, former=before)
    for name, app in by_name(goal).items():
        if app.get("import_path") == IMPORT_PATH:
            tally.note(name, Result(result.status), duration_s=result.duration_s)
    if result.status == "done" and (serves := serving.goal()):
        history.remember(serves)
    return report(result, as_json=options.as_json)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connect to a cluster for as long as a command takes; Ctrl-C only stops watching.

    Args:
        address: of the Ray cluster; None takes RAY_ADDRESS, or what `ray start` recorded.

    Raises:
        ConfigError: no cluster runs there.
    """
    if ray.is_initialized():
        yield
        return
    found = find_cluster(address)
    if found is None:
        raise ConfigError("no Ray cluster is running here; name one with --address")
    try:
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {found}: {sanitise(str(error))}") from None
    try:
        yield
    except KeyboardInterrupt:
        print("no longer watching; what was applied goes on", file=sys.stderr)
        raise
    finally:
        ray.shutdown()
