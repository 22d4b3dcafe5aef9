"""The application as a whole, for its status page: all replicas, and what all ingresses count.

Each ingress counts what passes through it, and puts its counts into Ray's key-value store; Serve
says which ingresses live.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError

from serve_app.api.status_page import Counts, View
from serve_app.cluster import kv
from serve_app.cluster.controller import replicas
from serve_app.cluster.placement import all_nodes
from serve_app.serve_config import INGRESS_DEPLOYMENT, SERVER_DEPLOYMENT
from serve_app.telemetry import cold_start

FRESH_S = 1.0  # however many people look
CONTROLLER_TIMEOUT_S = 2.0
PREFIX = "board/"
LICENSE = "license/"
WINDOW = "window/"


class Fleet:
    """One ingress' way to the others.

    Args:
        application: Serve's name of it.
        ingress: Serve's id of this replica of the ingress.
        clock: monotonic seconds.
    """

    def __init__(
        self, application: str, ingress: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._application, self._ingress = application, ingress
        self._clock = clock
        self._asking = asyncio.Lock()
        self._asked_at = -FRESH_S
        self._view = View(None, ())

    def tell(self, counts: Counts) -> None:
        """Let the other ingresses see this one's counts; blocks, and never raises for Ray."""
        key = f"{PREFIX}{self._application}/{self._ingress}"
        with suppress(RayError):
            kv.put(key, json.dumps(counts))

    async def look(self) -> View:
        """Return the replicas and the other ingresses' counts; asks at most once a second."""
        async with self._asking:
            if self._clock() - self._asked_at >= FRESH_S:
                self._view = await asyncio.to_thread(self._ask)
                self._asked_at = self._clock()
        return self._view

    def _ask(self) -> View:
        try:
            found = replicas(self._application, CONTROLLER_TIMEOUT_S)
            phases = cold_start.running(
                self._application, since=cold_start.now() - cold_start.LOST_S
            )
            names = {node["NodeID"]: str(node.get("NodeName") or "") for node in all_nodes()}
            counts = self._counts({each["replica_id"] for each in found[INGRESS_DEPLOYMENT]})
            text = self._kept(LICENSE)
            window = self._kept(WINDOW)
        except (RayError, ValueError, KeyError):
            return View(None, ())
        servers = found.get(SERVER_DEPLOYMENT, ())  # none while the service sleeps
        described = [_described(replica, phases, names) for replica in servers]
        return View(described, counts, text, window)

    def _kept(self, prefix: str) -> Any:
        """Return what a replica has left for all; None if none has."""
        key = f"{prefix}{self._application}"
        value = kv.get(key)
        return json.loads(value) if value else None

    def _counts(self, living: set[str]) -> tuple[Counts, ...]:
        """Return the counts of the other living ingresses, and forget those of the dead."""
        prefix, found = f"{PREFIX}{self._application}/", []
        for key in kv.keys(prefix):
            name = key.removeprefix(prefix)
            if name not in living:
                kv.delete(key)
            elif name != self._ingress:
                value = kv.get(key)
                found += [json.loads(value)] if value else []
        return tuple(found)


def living_nodes() -> set[str]:
    """Return the ids of the nodes that are in the cluster.

    Raises:
        RayError: the cluster does not answer.
    """
    return {str(node["NodeID"]) for node in all_nodes() if node["Alive"]}


def tell_license(application: str, text: dict[str, Any] | None) -> None:
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
