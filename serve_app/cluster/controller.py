"""What Serve's controller and Ray know of the whole instance; private calls of Ray 2.60."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray
from ray._private import state
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import (
    RAY_SERVE_ENABLE_HA_PROXY,
    SERVE_CONTROLLER_NAME,
    SERVE_NAMESPACE,
)
from ray.serve.context import _get_global_client


def instance_details(timeout_s: float) -> dict[str, Any]:
    """Ask for applications, deployments and replicas, in the shape of Serve's REST interface.

    Serve's own `serve.status()` asks the same, and waits for ever.

    Args:
        timeout_s: how long the controller may take, in seconds.

    Raises:
        RayError: it does not answer.
        ValueError: there is none.
    """
    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    asked: Any = controller.get_serve_instance_details.remote()
    details: dict[str, Any] = ray.get(asked, timeout=timeout_s)
    return details


def controller_client() -> Any:
    """Return Serve's own client of its controller; Serve has been started."""
    return _get_global_client()


def replicas(application: str, timeout_s: float) -> dict[str, list[dict[str, Any]]]:
    """Return an application's replicas by the name of their deployment.

    Serve names no deployment while a build runs and after it failed, though the version before
    serves on. Then the living actors count, each taken for running.

    Args:
        application: Serve's name of it.
        timeout_s: how long the controller may take, in seconds.

    Returns:
        `replica_id`, `node_id` and `state` of each, and what else Serve reports.

    Raises:
        RayError: the controller does not answer.
        ValueError: there is none.
        KeyError: it does not know the application.
    """
    deployments = instance_details(timeout_s)["applications"][application]["deployments"]
    if deployments:
        return {name: deployment["replicas"] for name, deployment in deployments.items()}
    found: dict[str, list[dict[str, Any]]] = {}
    for replica, actor in _actors():
        if replica.deployment_id.app_name == application:
            found.setdefault(replica.deployment_id.name, []).append(
                {
                    "replica_id": replica.unique_id,
                    "node_id": actor["Address"]["NodeID"],
                    "state": "RUNNING",
                }
            )
    return found


def living_replicas() -> set[str]:
    """Return the ids of all replicas of all applications whose actors live.

    Raises:
        RayError: the cluster does not answer.
    """
    return {replica.unique_id for replica, _ in _actors()}


def _actors() -> Iterator[tuple[ReplicaID, dict[str, Any]]]:
    for actor in state.actors(actor_state_name="ALIVE").values():
        # Serve has other actors with names: the controller, proxies, the autoscaler's.
        if ReplicaID.is_full_id_str(actor["Name"]):
            yield ReplicaID.from_full_id_str(actor["Name"]), actor


def through_haproxy() -> bool:
    """Return whether clients reach an ingress replica through Serve's HAProxy on its node."""
    return bool(RAY_SERVE_ENABLE_HA_PROXY)
