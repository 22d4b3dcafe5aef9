"""Asks every node for its receipt: what is served where, under which license, since when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.serve.schema import DeploymentSchema

from serve_app.access.receipt import NodeReceipt, receipt_here
from serve_app.cluster.connection import connected
from serve_app.cluster.nodes import Lost
from serve_app.cluster.placement import Placement, placement_of
from serve_app.cluster.tasks import NodeTasks, node_task
from serve_app.config import AppConfig

_RECEIPT = node_task(receipt_here)


def audit_cluster(
    config: AppConfig,
    *,
    runtime_env: Mapping[str, Any] | None = None,
    deployments: Sequence[DeploymentSchema] = (),
    address: str | None = None,
) -> tuple[NodeReceipt, ...] | None:
    """Ask every node that may host a replica, in the replicas' environment.

    Args:
        config: the application.
        runtime_env: of the application, as the Serve config has it.
        deployments: overrides of single deployments, as the Serve config has them.
        address: of the cluster; None takes RAY_ADDRESS, or what `ray start` recorded here.

    Returns:
        One entry for each eligible node; None if no cluster is named in any of these ways.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    environment = dict(runtime_env or {})
    asked = placement_of(config, environment, deployments)
    with connected(asked, environment, address) as placement:
        return None if placement is None else _ask(config, placement)


def audit_this_machine(config: AppConfig) -> tuple[NodeReceipt, ...]:
    """Look at this machine alone, without Ray."""
    return (receipt_here(config.model, config.access),)


def _ask(config: AppConfig, placement: Placement) -> tuple[NodeReceipt, ...]:
    tasks = NodeTasks(_RECEIPT, NodeReceipt, placement)
    answers = tasks.ask_all(config.model, config.access, timeout_s=config.access.deadline_s)
    return tuple(
        NodeReceipt(node.node_id, node.name, None, str(answer))
        if isinstance(answer, Lost)
        else replace(answer, node_id=node.node_id, node_name=node.name)
        for node, answer in answers
    )
