"""The application as a whole, for its status page: its replicas, and what its metrics say.

Serve says which replicas live, and Ray exports every replica's metrics, so nothing is counted for
the page and every ingress answers the same. Ray exports every ten seconds: so old are the numbers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError

from serve_app.api.app import GENERATION
from serve_app.api.shared import Shared
from serve_app.api.status_page import KeyUse, Load, View
from serve_app.cluster import kv
from serve_app.cluster.controller import replicas
from serve_app.cluster.placement import all_nodes
from serve_app.errors import RequestCancelled
from serve_app.protocol import FinishReason
from serve_app.serve_config import SERVER_DEPLOYMENT
from serve_app.telemetry import cold_start

FRESH_S = 1.0  # however many people look
LOAD_FRESH_S = 5.0  # each look asks every node for its metrics
RATE_WINDOW_S = 30.0  # three of Ray's exports
CONTROLLER_TIMEOUT_S = 2.0
LICENSE = "license/"
WINDOW = "window/"
REQUESTS = "ray_serve_app_requests_total"
QUEUED = "ray_serve_deployment_queued_queries"  # in Serve's line; its replica does not know it yet
SUMMED = {
    "ray_serve_app_num_requests_waiting": "waiting",
    "ray_serve_app_num_requests_running": "running",
    "ray_serve_app_generation_tokens_total": "generation_tokens",
}
KEY_REQUESTS = "ray_serve_app_key_requests_total"
OF_KEYS = {
    "ray_serve_app_key_prompt_tokens_total": "prompt_tokens",
    "ray_serve_app_key_generation_tokens_total": "completion_tokens",
}
_USED = tuple(f"{name}{{" for name in (REQUESTS, QUEUED, KEY_REQUESTS, *SUMMED, *OF_KEYS))


class Fleet:
    """All replicas and ingresses of one application.

    Args:
        application: Serve's name of it.
        metrics: returns the metrics of all nodes, as Prometheus reads them.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        application: str,
        metrics: Callable[[], Awaitable[str]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._application = application
        self._metrics = metrics
        self._clock = clock
        self._view = Shared(self._ask, fresh_s=FRESH_S)
        self._load = Shared(self._measure, fresh_s=LOAD_FRESH_S)
        self._tokens: deque[tuple[float, int]] = deque()  # when looked at, and how many there were

    async def look(self) -> View:
        """Return the replicas; asks at most once a second."""
        return await self._view.get()

    async def load(self) -> Load | None:
        """Return what the metrics say, at most five seconds old; None if there are none."""
        return await self._load.get()

    async def _ask(self) -> View:
        return await asyncio.to_thread(_view_of, self._application)

    async def _measure(self) -> Load | None:
        try:
            page = await self._metrics()
        except RayError:
            return None
        load = await asyncio.to_thread(load_of, page, self._application)
        now = self._clock()
        self._tokens.append((now, load.generation_tokens))
        while self._tokens[0][0] < now - RATE_WINDOW_S:
            self._tokens.popleft()
        seconds = now - self._tokens[0][0]
        if seconds <= 0:
            return load
        # A replica that ended takes its count with it; what others added since counts.
        new = sum(max(0, after - before) for (_, before), (_, after) in pairwise(self._tokens))
        return replace(load, tokens_per_s=round(new / seconds, 1))


def load_of(page: str, application: str) -> Load:
    """Add up the metrics of an application's replicas and ingresses.

    Args:
        page: of all nodes, as Prometheus reads it.
        application: Serve's name of it.
    """
    sums: Counter[str] = Counter()
    keys: defaultdict[str, Counter[str]] = defaultdict(Counter)
    # Before parsing: a page of all nodes has thousands of lines, of which a few dozen count.
    lines = "\n".join(line for line in page.splitlines() if line.startswith(_USED))
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            labels = sample.labels
            if labels.get("application") != application:
                continue
            counts = keys[labels["key"]] if "key" in labels else sums
            for kind in _kinds(sample.name, labels):
                counts[kind] += int(sample.value)
    return Load(
        waiting=sums["waiting"],
        running=sums["running"],
        finished=sums["finished"],
        failed=sums["failed"],
        generation_tokens=sums["generation_tokens"],
        keys={name: KeyUse(**counts) for name, counts in keys.items()},
    )


def _kinds(metric: str, labels: Mapping[str, str]) -> tuple[str, ...]:
    """Return the numbers of `Load`, or of its `KeyUse`, that a sample is a part of."""
    if metric == QUEUED:
        return ("waiting",) if labels.get("deployment") == SERVER_DEPLOYMENT else ()
    if metric == KEY_REQUESTS:
        return ("requests", "limited") if labels["limited"] == "yes" else ("requests",)
    if metric != REQUESTS:
        return ((SUMMED | OF_KEYS)[metric],)
    if labels["outcome"] in set(FinishReason):
        return ("finished",)
    if labels["path"] not in GENERATION or labels["outcome"] == RequestCancelled.code:
        return ()
    return ("failed",) if int(labels["status"]) >= 400 else ()


def _view_of(application: str) -> View:
    try:
        found = replicas(application, CONTROLLER_TIMEOUT_S)
        phases = cold_start.running(application, since=cold_start.now() - cold_start.LOST_S)
        names = {node["NodeID"]: str(node.get("NodeName") or "") for node in all_nodes()}
        text, window = (_kept(f"{prefix}{application}") for prefix in (LICENSE, WINDOW))
    except (RayError, ValueError, KeyError):
        return View(None)
    servers = found.get(SERVER_DEPLOYMENT, ())  # none while the service sleeps
    return View([_described(replica, phases, names) for replica in servers], text, window)


def _kept(key: str) -> Any:
    """Return what a replica has left for all; None if none has."""
    value = kv.get(key)
    return json.loads(value) if value else None


def publish_license(application: str, text: dict[str, Any] | None) -> None:
    """Let the status page say under which license text the weights lie; never raises for Ray.

    Args:
        application: Serve's name of it.
        text: its title, sha256 and commit; None if there is none.
    """
    _keep(f"{LICENSE}{application}", text)


def publish_window(application: str, max_context_tokens: int) -> None:
    """Let `/v1/models` say how many tokens the model takes; never raises for Ray.

    Args:
        application: Serve's name of it.
        max_context_tokens: prompt and completion together.
    """
    _keep(f"{WINDOW}{application}", max_context_tokens)


def _keep(key: str, fact: object) -> None:
    with suppress(RayError):
        kv.put(key, json.dumps(fact))


def _described(
    replica: dict[str, Any], phases: dict[str, cold_start.Phase], names: dict[str, str]
) -> dict[str, Any]:
    node, state = str(replica.get("node_id") or ""), replica["state"]
    phase = phases.get(replica["replica_id"])
    return {
        "name": replica["replica_id"],
        "node": names.get(node) or node[:12],
        "state": str(getattr(state, "value", state)),
        "phase": phase and phase.name,
        "done_bytes": phase and phase.done_bytes,
        "total_bytes": phase and phase.total_bytes,
    }
