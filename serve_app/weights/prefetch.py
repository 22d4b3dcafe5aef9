"""The weights on every node before a replica needs them, as replicas fetch them themselves.

The gate comes first: only nodes that have just proven their access are asked.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from serve_app.cluster.nodes import Lost
from serve_app.cluster.placement import Placement
from serve_app.cluster.tasks import NodeTasks, node_task
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import ServeAppError
from serve_app.weights.fetch import fetch
from serve_app.weights.peers import Peers


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What became of one node.

    Args:
        node: its name.
        directory: where the model is there now; "" if it is not.
        hub_bytes: fetched from the Hub, or the store at `model.url`.
        peer_bytes: fetched from other nodes.
        cache_bytes: were there.
        duration_s: on the node.
        fault: why the model is not there, in one sentence.
    """

    node: str
    directory: str = ""
    hub_bytes: int = 0
    peer_bytes: int = 0
    cache_bytes: int = 0
    duration_s: float = 0.0
    fault: str = ""


def prefetch(
    model: ModelConfig,
    access: AccessConfig,
    commit: str,
    placements: Sequence[Placement],
    *,
    timeout_s: float,
) -> list[Prefetched]:
    """Fetch a proven commit onto every node where a replica may run, all at once.

    They share what the Hub sends once, as at a start (`peers.py`).

    Args:
        model: what to fetch.
        access: which token, which Hub.
        commit: 40 hex digits, from the gate.
        placements: where replicas may run, and in which environment.
        timeout_s: limit of all nodes together.

    Returns:
        One entry for each node, in the order of the placements.
    """
    deadline = time.monotonic() + timeout_s
    done: dict[str, Prefetched] = {}
    for placement in placements:
        tasks = NodeTasks(_FETCH, Prefetched, placement)
        left_s = max(1.0, deadline - time.monotonic())
        for node, answer in tasks.ask_all(model, access, commit, timeout_s=left_s):
            result = Prefetched("", fault=str(answer)) if isinstance(answer, Lost) else answer
            # A node of two placements has one cache, unless their environments name two.
            done.setdefault(f"{node.node_id} {result.directory}", replace(result, node=node.name))
    return list(done.values())


def lacking(results: Sequence[Prefetched]) -> list[Prefetched]:
    """Return the nodes that do not have the model."""
    return [result for result in results if result.fault]


def line(result: Prefetched) -> str:
    """Say in one line what became of a node."""
    if result.fault:
        return f"{result.node}: not there: {result.fault}"
    return (
        f"{result.node}: {result.hub_bytes:,} bytes fetched, {result.peer_bytes:,} from other "
        f"nodes, {result.cache_bytes:,} were there; {result.duration_s:.1f} s"
    )


def fetch_here(
    model: ModelConfig, access: AccessConfig, commit: str, *, peers: Peers | None = None
) -> Prefetched:
    """Fetch a proven commit to this machine.

    Args:
        model: what to fetch.
        access: which token, which Hub.
        commit: 40 hex digits, from the gate.
        peers: other nodes that may have it; None asks the Hub alone.

    Returns:
        What became of it, without the node's name; never raises for what can go wrong.
    """
    began = time.monotonic()
    try:
        fetched = fetch(model, access, commit, peers=peers)
    except ServeAppError as error:
        return Prefetched("", fault=error.message)
    return Prefetched(
        "",
        str(fetched.directory),
        hub_bytes=fetched.hub_bytes,
        peer_bytes=fetched.peer_bytes,
        cache_bytes=fetched.cache_bytes,
        duration_s=time.monotonic() - began,
    )


def _fetch_on_node(model: Any, access: Any, commit: str) -> Prefetched:
    return fetch_here(model, access, commit, peers=Peers.of(model, commit))


_FETCH = node_task(_fetch_on_node)
