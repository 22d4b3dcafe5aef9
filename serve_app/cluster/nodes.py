"""Which nodes may host a replica: pure decisions over what Ray reports of its nodes.

A node counts by what it has in total, not by what is free now: a replica may land there later,
when nobody asks again.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Ray asks for this much of `accelerator_type:X` (ray/_private/ray_constants, 2.60).
ACCELERATOR_SHARE = 0.001


@dataclass(frozen=True, slots=True)
class Node:
    """One node of the cluster."""

    node_id: str
    name: str


class Lost(Exception):
    """A function that ran on a node ended without an answer; the message says how."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one replica, or one bundle of its placement group, asks of a node.

    Args:
        resources: amounts by Ray's names: CPU, GPU, accelerator_type:X, custom ones.
        labels: Ray's label selector: `value`, `!value`, `in(a,b)`, `!in(a,b)`.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Say it in the words of the config."""
        asked = [f"{name} {amount:g}" for name, amount in self.resources.items() if amount]
        asked += [f"label {key}={value}" for key, value in self.labels.items()]
        return ", ".join(asked) or "nothing"


def demand_of(options: Mapping[str, Any]) -> Demand:
    """Read a Serve deployment's `ray_actor_options`; Serve gives a replica 1 CPU by default."""
    resources = {
        str(name): float(amount) for name, amount in (options.get("resources") or {}).items()
    }
    cpus, gpus = options.get("num_cpus"), options.get("num_gpus")
    # Ray itself gives an actor 0 CPUs to run with; Serve's deployments ask for 1.
    resources["CPU"] = 1.0 if cpus is None else float(cpus)
    resources["GPU"] = float(gpus or 0)
    if options.get("memory"):
        resources["memory"] = float(options["memory"])
    if options.get("accelerator_type"):
        # As Ray does it: the type is a resource, of which each replica takes a sliver.
        resources[f"accelerator_type:{options['accelerator_type']}"] = ACCELERATOR_SHARE
    return Demand(resources, dict(options.get("label_selector") or {}))


def eligible(
    nodes: Sequence[Mapping[str, Any]],
    demands: Sequence[Demand],
    draining: Collection[str] = (),
) -> list[Node]:
    """Return the nodes that can host any of the demands, sorted by name.

    Args:
        nodes: as `ray.nodes()` returns them.
        demands: one for a replica, several for the bundles of a placement group.
        draining: ids of nodes that Ray is emptying.
    """
    found = [
        Node(node["NodeID"], str(node.get("NodeName") or node["NodeID"][:12]))
        for node in nodes
        if node.get("Alive")
        and node["NodeID"] not in draining
        and any(_fits(node, demand) for demand in demands)
    ]
    return sorted(found, key=lambda node: (node.name, node.node_id))


def shortage(nodes: Sequence[Mapping[str, Any]], demands: Sequence[Demand]) -> str:
    """Say what a replica asks for and what the nodes have, when none of them fits."""
    alive = [node for node in nodes if node.get("Alive")]
    asked = " or ".join(str(demand) for demand in demands)
    if not alive:
        return f"a replica asks for {asked}; the cluster has no node that is alive"
    # Only what was asked for is listed: a node's other resources explain nothing.
    wanted = {name for demand in demands for name in demand.resources}
    labels = {name for demand in demands for name in demand.labels}
    offers: dict[str, int] = {}
    for node in alive:
        offer = _offer(node, wanted, labels)
        offers[offer] = offers.get(offer, 0) + 1
    listed = "; ".join(f"{count} with {offer}" for offer, count in list(offers.items())[:6])
    return f"a replica asks for {asked}; the nodes that are alive: {listed}"


def label_matches(selector: str, value: str | None) -> bool:
    """Return whether a node's label satisfies one entry of a Ray label selector."""
    negated = selector.startswith("!")
    body = selector[1:] if negated else selector
    several = re.fullmatch(r"in\((.*)\)", body.strip())
    choices = [choice.strip() for choice in several[1].split(",")] if several else [body]
    return (value in choices) is not negated


def _fits(node: Mapping[str, Any], demand: Demand) -> bool:
    has, labels = node.get("Resources") or {}, node.get("Labels") or {}
    # Totals: what is in use now may be free when the rollout comes to it.
    return all(has.get(name, 0.0) >= amount for name, amount in demand.resources.items()) and all(
        label_matches(selector, labels.get(key)) for key, selector in demand.labels.items()
    )


def _offer(node: Mapping[str, Any], wanted: Collection[str], labels: Collection[str]) -> str:
    has, set_labels = node.get("Resources") or {}, node.get("Labels") or {}
    parts = [f"{name} {has.get(name, 0):g}" for name in sorted(wanted)]
    parts += [f"label {key}={set_labels.get(key, 'unset')}" for key in sorted(labels)]
    return ", ".join(parts)
