"""What the replicas of an application are at, as Serve and the ledger tell it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from serve_app import ledger
from serve_app.access.placement import all_nodes
from serve_app.controller import instance_details
from serve_app.serve_config import SERVER_DEPLOYMENT

FRESH_S = 1.0  # however many people look
CONTROLLER_TIMEOUT_S = 2.0


class Replicas:
    """Asks at most once a second, off the event loop.

    Args:
        application: Serve's name of it.
        read: asks; see `read`.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        application: str,
        read: Callable[[str], list[dict[str, Any]] | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._application = application
        self._read = read or read_replicas
        self._clock = clock
        self._asking = asyncio.Lock()
        self._asked_at = -FRESH_S
        self._found: list[dict[str, Any]] | None = None

    async def __call__(self) -> list[dict[str, Any]] | None:
        """Return what `read_replicas` found, at most a second ago."""
        async with self._asking:
            if self._clock() - self._asked_at >= FRESH_S:
                self._found = await asyncio.to_thread(self._read, self._application)
                self._asked_at = self._clock()
        return self._found


def read_replicas(application: str) -> list[dict[str, Any]] | None:
    """Ask Serve's controller and the ledger; never raises.

    Returns:
        `name`, `node`, `state` (STARTING, RUNNING, STOPPING, …) and, while it starts, `phase`,
        `done_bytes` and `total_bytes` of each replica of the LLM server; None if it is not known.
    """
    try:
        deployments = instance_details(CONTROLLER_TIMEOUT_S)["applications"][application][
            "deployments"
        ]
        replicas = deployments[SERVER_DEPLOYMENT]["replicas"]
        phases = ledger.running(application, since=time.time() - ledger.LOST_S)
        names = {node["NodeID"]: str(node.get("NodeName") or "") for node in all_nodes()}
    except (RayError, ValueError, KeyError):
        return None
    return [_described(replica, phases, names) for replica in replicas]


def _described(
    replica: dict[str, Any], phases: dict[str, ledger.Phase], names: dict[str, str]
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
