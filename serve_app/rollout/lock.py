"""One rollout of a cluster at a time.

The lock is an actor with a name that only one can have. It belongs to the process that holds
it, so Ray takes it away when that process ends, however it ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import ray
from ray.exceptions import RayError

from serve_app.cluster.kv import NAMESPACE
from serve_app.errors import ConfigError
from serve_app.telemetry.rollout_history import whoami

NAME = "rollout"
ANSWER_TIMEOUT_S = 10.0
AGAIN_S = 1.0
START_TIMEOUT_S = 60.0  # of a process that needs no CPU


class _Lock:
    def __init__(self, holder: str) -> None:
        self._holder = holder

    def holder(self) -> str:
        return self._holder


@contextmanager
def rollout_lock(name: str = NAME, *, wait_s: float = 0.0) -> Iterator[None]:
    """Hold the lock.

    Args:
        name: of the lock.
        wait_s: how long somebody else may hold it before this gives up.

    Raises:
        ConfigError: somebody else does; says who, and since when. Or the cluster starts nothing.
    """
    since = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    holder = f"{whoami()} (process {os.getpid()}), since {since}"
    actor: Any = ray.remote(num_cpus=0)(_Lock)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            # Not detached: Ray ends it with the process that holds it: no lock is left behind.
            held: Any = actor.options(name=name, namespace=NAMESPACE).remote(holder)
            break
        except ValueError:
            if time.monotonic() > deadline:
                raise ConfigError(f"another rollout is under way: {_holder(name)}") from None
        time.sleep(AGAIN_S)
    try:
        _wait_for(held)
        yield
    finally:
        # Without it the name stays taken until Python forgets the handle.
        ray.kill(held)


def _wait_for(held: Any) -> None:
    try:
        ray.get(held.holder.remote(), timeout=START_TIMEOUT_S)
    except RayError as error:
        kind = type(error).__name__
        raise ConfigError(
            f"the cluster starts no process for the rollout's lock ({kind})"
        ) from None


def _holder(name: str) -> str:
    try:
        other: Any = ray.get_actor(name, namespace=NAMESPACE)
        return str(ray.get(other.holder.remote(), timeout=ANSWER_TIMEOUT_S))
    except (ValueError, RayError):
        return "it ends just now; try again"
