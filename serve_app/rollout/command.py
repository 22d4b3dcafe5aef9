"""The part of `serve-app deploy` after the gate: connect, show the plan, roll out."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import ray
import yaml

from serve_app.access.placement import find_cluster
from serve_app.access.report import sanitise
from serve_app.errors import ConfigError
from serve_app.rollout.deploy import changes, deploy, report
from serve_app.rollout.instance import Instance


def run(path: Path, *, address: str | None, timeout_s: float, as_json: bool, dry_run: bool) -> int:
    """Roll a checked config out.

    Args:
        path: the Serve YAML.
        address: of the Ray cluster; None takes RAY_ADDRESS, or what `ray start` recorded.
        timeout_s: limit of the rollout, and of going back, in seconds.
        as_json: print one JSON object at the end.
        dry_run: show the plan alone.

    Returns:
        The exit code: 0 the new version serves, 5 it does not.

    Raises:
        ConfigError: no cluster runs there.
    """
    goal = yaml.safe_load(path.read_text(encoding="utf-8"))
    mine = not ray.is_initialized()
    if mine:
        _connect(address)
    try:
        serving = Instance(goal)
        for line in changes(serving.goal(), goal):
            print(line, file=sys.stderr)
        if dry_run:
            return 0
        return report(deploy(serving, goal, timeout_s=timeout_s), as_json=as_json)
    except KeyboardInterrupt:
        print("no longer watching; what was applied goes on", file=sys.stderr)
        return 130
    finally:
        if mine:
            ray.shutdown()


def _connect(address: str | None) -> None:
    found = find_cluster(address)
    if found is None:
        raise ConfigError("no Ray cluster is running here; name one with --address")
    try:
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {found}: {sanitise(str(error))}") from None
