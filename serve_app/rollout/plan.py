"""What a rollout would do, line by line, before it does it."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app import ledger
from serve_app.access.cluster import NodeTasks, node_task
from serve_app.access.collect import Lost
from serve_app.access.placement import placement_of
from serve_app.access.verdict import Verdict
from serve_app.errors import ServeAppError
from serve_app.serve_config import ServedApp
from serve_app.weights.bring import lacking_bytes

LOOK_TIMEOUT_S = 30.0
UNKNOWN_BYTES = -1


def changes(before: dict[str, Any] | None, goal: dict[str, Any]) -> list[str]:
    """Tell what a config would do, one line for each application."""
    old = by_name(before or {"applications": []})
    new = by_name(goal)
    lines = []
    for name, app in new.items():
        if name not in old:
            lines.append(f"{name}: new")
        elif app == old[name]:
            lines.append(f"{name}: unchanged, nothing restarts")
        else:
            keys = sorted(k for k in {*app, *old[name]} if app.get(k) != old[name].get(k))
            lines.append(f"{name}: changes {', '.join(keys)}; replicas are replaced one by one")
    return [*lines, *(f"{name}: removed" for name in old if name not in new)]


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
    if app.config.model.path is None:
        yield from _bytes(app, verdict)
    yield forecast(app.name)


def forecast(application: str) -> str:
    """Tell how long a replica of an application takes to be ready, by its earlier starts."""
    try:
        took = [start.ready_s for start in ledger.recent() if start.application == application]
    except RayError:
        took = []
    if not took:
        return f"{application}: no earlier start to judge the time by"
    return (
        f"{application}: a replica was ready after {statistics.median(took):.0f} s "
        f"(median of {len(took)} starts, {min(took):.0f} to {max(took):.0f} s)"
    )


def by_name(goal: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return a config's applications by their names."""
    return {app.get("name", "default"): app for app in goal["applications"]}


def _bytes(app: ServedApp, verdict: Verdict) -> Iterator[str]:
    placement = placement_of(app.config, app.runtime_env, app.deployments)
    nodes: NodeTasks[int] = NodeTasks(node_task(_look), int, placement)
    model, access = app.config.model, app.config.access
    for node, answer in nodes.ask_all(model, access, verdict.commit, timeout_s=LOOK_TIMEOUT_S):
        if isinstance(answer, Lost) or answer == UNKNOWN_BYTES:
            told = "its cache could not be looked at"
        else:
            told = f"{answer:,} bytes to fetch" if answer else "has the weights"
        yield f"{app.name}: {node.name}: {told}"


def _look(model: Any, access: Any, commit: str) -> int:
    try:
        return lacking_bytes(model, access, commit)
    except (ServeAppError, OSError):
        return UNKNOWN_BYTES
