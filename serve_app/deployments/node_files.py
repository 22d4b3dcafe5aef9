"""The token files of nodes where no process of ours runs: a task on each node looks at them.

A task ends when a file has changed, or after a while, and the next one goes on from what it saw: a
change between two tasks is seen as well. Only where the application's replicas are: a task keeps
Ray's autoscaler from taking a node away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

import ray
from ray.exceptions import RayError

from serve_app.access.file_watch import Change, Look, look_until_change
from serve_app.access_config import AccessConfig
from serve_app.cluster.nodes import Lost, Node
from serve_app.cluster.placement import Placement
from serve_app.cluster.tasks import NodeTasks, node_task

TASK_S = 60.0  # of one task on a node, which holds a process there
HOSTS_S = 5.0  # between two questions where the replicas are
LOST_S = 30.0  # until another one is tried where one was lost
_LOOK = node_task(look_until_change)
_Ref: TypeAlias = "ray.ObjectRef[Look]"


class NodeFiles:
    """Looks at the token files of every node that has a replica of an application.

    Args:
        hosts: returns the ids of the nodes that have a replica; None while nobody knows.
        on_change: called with a node's id for each file that changed.
        tasks: runs the looks on the nodes of a placement; replaced in tests.
    """

    def __init__(
        self,
        hosts: Callable[[], frozenset[str] | None],
        on_change: Callable[[str, Change], None],
        tasks: Callable[[Placement], NodeTasks[Look]] = lambda place: NodeTasks(_LOOK, Look, place),
    ) -> None:
        self._access = AccessConfig()
        self._ask_hosts = hosts
        self._hosts: frozenset[str] = frozenset()
        self._hosts_until = 0.0
        self._on_change = on_change
        self._make = tasks
        self._tasks: list[NodeTasks[Look]] = []
        self._running: dict[tuple[int, str], _Ref] = {}
        self._known: dict[tuple[int, str], dict[str, str]] = {}
        self._pauses: dict[tuple[int, str], float] = {}

    def place(self, access: AccessConfig, placements: Sequence[Placement]) -> None:
        """Look from now on at the files that `access` names, on nodes of these placements."""
        self.stop()
        self._access = access
        self._known, self._pauses = {}, {}
        self._tasks = [self._make(placement) for placement in placements]

    def stop(self) -> None:
        """Look no more."""
        for (which, _), ref in self._running.items():
            with suppress(RayError):
                self._tasks[which].cancel(ref)
        self._running = {}

    def changed(self) -> frozenset[str]:
        """Return the ids of the nodes whose files changed since the last call, and look on.

        A node that is looked at for the first time counts: its files may have changed since it was
        asked last.
        """
        changed = set()
        for which, tasks in enumerate(self._tasks):
            changed |= self._take(which, tasks)
        if time.monotonic() >= self._hosts_until:
            found = self._ask_hosts()
            self._hosts = self._hosts if found is None else found
            self._hosts_until = time.monotonic() + HOSTS_S
        for which, tasks in enumerate(self._tasks if self._hosts else ()):
            nodes = {each.node_id: each for each in tasks.nodes() if each.node_id in self._hosts}
            self._start(which, tasks, nodes)
        return frozenset(changed)

    def _take(self, which: int, tasks: NodeTasks[Look]) -> set[str]:
        running = {ref: key for key, ref in self._running.items() if key[0] == which}
        changed = set()
        for ref in tasks.wait(list(running), 0) if running else []:
            key = running[ref]
            del self._running[key]
            try:
                look = tasks.result(ref)
            except Lost:  # the node, or its worker; the next look goes on from what was known
                self._pauses[key] = time.monotonic() + LOST_S
                continue
            if key not in self._known:
                changed.add(key[1])
            self._known[key] = look.stamps
            for change in look.changes:
                changed.add(key[1])
                self._on_change(key[1], change)
        return changed

    def _start(self, which: int, tasks: NodeTasks[Look], nodes: dict[str, Node]) -> None:
        for node_id, node in nodes.items():
            key = (which, node_id)
            if key not in self._running and time.monotonic() >= self._pauses.get(key, 0.0):
                self._running[key] = tasks.start(node, self._access, self._known.get(key), TASK_S)
