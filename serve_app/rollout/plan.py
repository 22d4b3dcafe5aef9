"""What a rollout would do, line by line, before it does it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.access.verdict import Verdict
from serve_app.cluster.nodes import Lost
from serve_app.cluster.placement import placement_of
from serve_app.cluster.tasks import NodeTasks, node_task
from serve_app.errors import ServeAppError
from serve_app.rollout.forecast import forecast
from serve_app.serve_config import ServedApp
from serve_app.telemetry import cold_start
from serve_app.weights.fetch import lacking_bytes

LOOK_TIMEOUT_S = 30.0
UNKNOWN_BYTES = -1


def needs(app: ServedApp, verdict: Verdict) -> Iterator[str]:
    """Tell what an application's replicas need: GPUs, bytes on each node, seconds."""
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
    lacking = _lacking(app, verdict) if app.config.model.path is None else []
    for node, size in lacking:
        told = f"{size:,} bytes to fetch" if size else "has the weights"
        yield f"{app.name}: {node}: {'its cache could not be looked at' if size is None else told}"
    yield from forecasts(app.name, max((size or 0 for _, size in lacking), default=0))


def forecasts(application: str, most_bytes: int) -> Iterator[str]:
    """Tell how long a replica takes to be ready, by the earlier starts of its application.

    Args:
        application: its name.
        most_bytes: to fetch on the node that lacks most.
    """
    try:
        earlier = [start for start in cold_start.recent() if start.application == application]
    except RayError:
        earlier = []
    if not earlier:
        yield f"{application}: no earlier start to judge the time by"
        return
    took = [start.ready_s for start in earlier]
    yield (
        f"{application}: a replica was ready after {statistics.median(took):.0f} s "
        f"(median of {len(took)} starts, {min(took):.0f} to {max(took):.0f} s)"
    )
    for size in dict.fromkeys((0, most_bytes)):
        where = f"where {size:,} bytes are to be fetched" if size else "where the weights are"
        if (expected := forecast(earlier, fetch_bytes=size)) is None:
            yield f"{application}: forecast {where}: none, no replica fetched before"
        else:
            yield f"{application}: forecast {where}: {expected.ready_s:.0f} s"


def _lacking(app: ServedApp, verdict: Verdict) -> list[tuple[str, int | None]]:
    """Return each node's name and the bytes that it must fetch; None if it could not be asked."""
    placement = placement_of(app.config, app.runtime_env, app.deployments)
    nodes: NodeTasks[int] = NodeTasks(node_task(_look), int, placement)
    model, access = app.config.model, app.config.access
    lacking: list[tuple[str, int | None]] = []
    for node, answer in nodes.ask_all(model, access, verdict.commit, timeout_s=LOOK_TIMEOUT_S):
        known = None if isinstance(answer, Lost) or answer == UNKNOWN_BYTES else answer
        lacking.append((node.name, known))
    return lacking


def _look(model: Any, access: Any, commit: str) -> int:
    try:
        return lacking_bytes(model, access, commit)
    except (ServeAppError, OSError):
        return UNKNOWN_BYTES
