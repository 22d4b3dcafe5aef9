"""What Serve's controller tells of the whole instance; private in Ray 2.60, and so here alone."""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE


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
