"""The root of an application that nobody asks over HTTP.

Serve may open a port for the root of an application, whatever its route is, and no key is asked
there. So it is not the replicas of a canary that stand at its root, but this, which does nothing.
"""

from __future__ import annotations

from typing import Any

from ray.serve.handle import DeploymentHandle


class Unrouted:
    """Holds the application together.

    Args:
        llm: the replicas; others find them by their name.
    """

    def __init__(self, llm: DeploymentHandle[Any]) -> None:
        self.llm = llm
