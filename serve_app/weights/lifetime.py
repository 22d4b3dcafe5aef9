"""Actors that every process of the cluster finds by name, and that end when nobody uses them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

NAMESPACE = "serve_app"
IDLE_S = 60.0


class Lifetime:
    """Ends the actor that this is a part of, some time after its last use."""

    def __init__(self) -> None:
        self._uses = 0
        self._last = time.monotonic()
        self._lock = threading.Lock()
        self._actor: Any = ray.get_runtime_context().current_actor
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep the actor for as long as the block runs."""
        with self._lock:
            self._uses += 1
        try:
            yield
        finally:
            with self._lock:
                self._uses -= 1
                self._last = time.monotonic()

    def _watch(self) -> None:
        while self._uses or time.monotonic() - self._last < IDLE_S:
            time.sleep(1.0)
        ray.kill(self._actor)


def named_actor(kind: type, name: str, **options: Any) -> Any:
    """Return the actor of a name, started now if there is none.

    Args:
        kind: its class, made without arguments.
        name: in the whole cluster.
        options: of Ray.
    """
    return (
        ray.remote(kind)
        .options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",  # not ended with whoever started it
            get_if_exists=True,
            num_cpus=0,
            **options,
        )
        .remote()
    )
