"""What a rollout would do, line by line, before it does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray

from serve_app.access.verdict import Verdict
from serve_app.cluster.nodes import Lost
from serve_app.cluster.placement import placement_of
from serve_app.cluster.tasks import NodeTasks, node_task
from serve_app.errors import ServeAppError
from serve_app.serve_config import ServedApp
from serve_app.weights.fetch import lacking_bytes

LOOK_TIMEOUT_S = 30.0
UNKNOWN_BYTES = -1


def needs(app: ServedApp, verdict: Verdict) -> Iterator[str]:
    """Yield what an application's replicas need: GPUs, and bytes to fetch on each node."""
    replica = app.config.replica
    free = ray.available_resources().get("GPU", 0.0)  # type: ignore[no-untyped-call]
    if replica.num_gpus:
        yield (
            f"{app.name}: {replica.num_gpus:g} GPUs a replica, {replica.min_replicas} replicas at "
            f"the least; {free:g} GPUs are free now"
        )
        if free < replica.num_gpus:
            yield (
                f"{app.name}: no replica can start beside those that run: with no spare GPU the "
                "rollout waits until --timeout, and goes back"
            )
    lacking = _lacking(app, verdict) if any(verdict.commits.values()) else []
    for node, size in lacking:
        if size is None:
            found = "its cache could not be read"
        else:
            found = f"{size:,} bytes to fetch" if size else "has the weights"
        yield f"{app.name}: {node}: {found}"


def _lacking(app: ServedApp, verdict: Verdict) -> list[tuple[str, int | None]]:
    """Return each node's name and the bytes that it must fetch; None if it could not be asked."""
    placement = placement_of(app.config, app.runtime_env, app.deployments)
    nodes: NodeTasks[int] = NodeTasks(node_task(_look), int, placement)
    wanted = app.config.model.at_commits(verdict.commits)
    lacking: list[tuple[str, int | None]] = []
    for node, answer in nodes.ask_all(wanted, app.config.access, timeout_s=LOOK_TIMEOUT_S):
        known = None if isinstance(answer, Lost) or answer == UNKNOWN_BYTES else answer
        lacking.append((node.name, known))
    return lacking


def _look(wanted: Any, access: Any) -> int:
    try:
        return sum(lacking_bytes(model, access, commit) for model, commit in wanted)
    except (ServeAppError, OSError):
        return UNKNOWN_BYTES
