"""The swarms of a cluster in one small actor, and how a node talks to its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError

from serve_app.cluster.placement import living_nodes
from serve_app.weights.announcements import Announcements, node_of
from serve_app.weights.lifetime import Lifetime, named_actor
from serve_app.weights.pieces import Answer, File, Report
from serve_app.weights.swarm import SILENT_S, Swarm, Unknown

REFRESH_S = 2.0
ANSWER_S = 30.0  # for an answer of the actor, which may have to start first

Commit = tuple[str, str]


class Tracker:
    """Knows who takes part, by commit; decides what `Swarm` decides."""

    def __init__(self) -> None:
        self._lifetime = Lifetime()
        self._lock = threading.Lock()
        self._swarms: dict[Commit, Swarm] = {}
        self._refreshed: dict[Commit, float] = {}

    def join(self, commit: Commit, name: str, silent_s: float, said: Mapping[str, Any]) -> Any:
        """See `Swarm.join`; the first node makes the swarm of a commit."""
        with self._lifetime.used(), self._lock:
            swarm = self._swarms.setdefault(commit, Swarm(silent_s=silent_s))
            self._refresh(commit, swarm)
            return swarm.join(name, now=time.monotonic(), **said)

    def exchange(self, commit: Commit, name: str, report: Report) -> Answer:
        """See `Swarm.exchange`."""
        with self._lifetime.used(), self._lock:
            swarm = self._swarms.get(commit)
            if swarm is None:
                raise Unknown(name)
            if time.monotonic() - self._refreshed[commit] > REFRESH_S:
                self._refresh(commit, swarm)
            return swarm.exchange(name, report, now=time.monotonic())

    def leave(self, commit: Commit, name: str) -> None:
        """See `Swarm.leave`."""
        with self._lifetime.used(), self._lock:
            if swarm := self._swarms.get(commit):
                swarm.leave(name)

    def _refresh(self, commit: Commit, swarm: Swarm) -> None:
        """Look at which nodes are alive, and which of them have the commit whole."""
        self._refreshed[commit] = time.monotonic()
        alive, keys = living_nodes(), Announcements(*commit)
        for name in swarm.nodes:
            if node_of(name) not in alive:
                swarm.lose(name)
        for name in keys.below("has"):
            if node_of(name) in alive:
                swarm.seed(name)
            else:
                keys.delete(f"has/{name}")


class Tracking:
    """One commit's swarm, as a node reaches it, wherever the actor lives.

    Args:
        commit: repository and 40 hex digits.
        name: of the node.
        silent_s: after which silence others do what the node was to do.
    """

    def __init__(self, commit: Commit, name: str, *, silent_s: float = SILENT_S) -> None:
        self._commit = commit
        self._name = name
        self._silent_s = silent_s
        self._actor: Any = None

    def join(
        self,
        files: Iterable[File],
        *,
        chunked: Iterable[File],
        whole: Iterable[File],
        here: Mapping[File, Mapping[int, str]],
    ) -> dict[File, tuple[int, set[int]]]:
        """See `Swarm.join`; raises RayError."""
        said = {"files": files, "chunked": chunked, "whole": whole, "here": here}
        joined: dict[File, tuple[int, set[int]]] = self._ask("join", self._silent_s, said)
        return joined

    def exchange(self, report: Report) -> Answer:
        """See `Swarm.exchange`; raises `Unknown`, RayError."""
        answer: Answer = self._ask("exchange", report)
        return answer

    def leave(self) -> None:
        """See `Swarm.leave`; raises RayError."""
        self._ask("leave")

    def _ask(self, method: str, *arguments: Any) -> Any:
        try:
            return self._call(method, *arguments)
        except RayActorError:  # it ended, or its node did; the next one knows nothing yet
            self._actor = None
            return self._call(method, *arguments)

    def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            self._actor = named_actor(Tracker, "weights/tracker")
        call = getattr(self._actor, method)
        return ray.get(call.remote(self._commit, self._name, *arguments), timeout=ANSWER_S)
