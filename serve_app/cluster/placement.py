"""Where replicas may go, and in which environment: what Ray and Serve know about it.

A Serve config can override a deployment's resources and environment without the builder ever
seeing it, so the goal is read from the controller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.schema import DeploymentSchema, ServeApplicationSchema

from serve_app.cluster.nodes import Demand, demand_of
from serve_app.config import AppConfig, ReplicaConfig, parse_args
from serve_app.errors import ConfigError
from serve_app.serve_config import SERVER_DEPLOYMENT

CONTROLLER_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where replicas go and in which environment they run.

    Args:
        demands: what a replica asks of its node; several for a placement group's bundles.
        runtime_env: Ray's runtime environment of the replica, over the caller's own.
    """

    demands: tuple[Demand, ...]
    runtime_env: Mapping[str, Any] = field(default_factory=dict)


def placements_of(config: AppConfig) -> tuple[Placement, ...]:
    """Find where the replicas of these args may go, overrides of the Serve config included."""
    found: list[Placement] = []
    for application in goal_applications():
        placement = _placement(application, config)
        if placement is not None and placement not in found:
            found.append(placement)
    # Without Serve, or before it knows the application: then nothing can override the config.
    return tuple(found) or (asked_by(config),)


def applications_of(config: AppConfig) -> list[str]:
    """Return the names of the applications that Serve is rolling out with these args."""
    return [app.name for app in goal_applications() if _is_of(app, config)]


def applications_with(import_path: str, args: Mapping[str, Any]) -> list[ServeApplicationSchema]:
    """Return the applications that Serve is rolling out from this builder and these very args."""
    return [
        app for app in goal_applications() if app.import_path == import_path and app.args == args
    ]


def placement_of(
    config: AppConfig,
    runtime_env: Mapping[str, Any],
    deployments: Sequence[DeploymentSchema] = (),
) -> Placement:
    """Find where the replicas of an application go, as Serve decides it.

    Args:
        config: the application's args.
        runtime_env: of the application, as the Serve config has it.
        deployments: overrides of single deployments, as the Serve config has them.
    """
    options: dict[str, Any] = actor_options(config.replica)
    bundles: Any = None
    for deployment in deployments:
        # Defaults of the schema are no overrides: Serve leaves what is not set to the code.
        overrides = deployment.model_dump(exclude_unset=True)
        if overrides.get("name") == SERVER_DEPLOYMENT:
            # Replaced as a whole and not merged, as Serve does it.
            options = overrides.get("ray_actor_options") or options
            bundles = overrides.get("placement_group_bundles")
    demands = bundle_demands(bundles or (), options) or (demand_of(options),)
    return Placement(demands, merged_runtime_env(runtime_env, options.get("runtime_env") or {}))


def asked_by(config: AppConfig) -> Placement:
    """Return what the config itself asks for, in the caller's own environment."""
    return Placement((demand_of(actor_options(config.replica)),))


def actor_options(replica: ReplicaConfig) -> dict[str, Any]:
    """Return Ray's options for one replica's actor: what it gets, and what the gate goes by."""
    options: dict[str, Any] = {"num_cpus": replica.num_cpus, "num_gpus": replica.num_gpus}
    if replica.accelerator_type:
        options["accelerator_type"] = replica.accelerator_type
    if replica.resources:
        options["resources"] = dict(replica.resources)
    if replica.label_selector:
        options["label_selector"] = dict(replica.label_selector)
    return options


def all_nodes() -> list[dict[str, Any]]:
    """Return every node that Ray knows, dead ones too."""
    return list(ray.nodes())  # type: ignore[no-untyped-call]


def living_nodes() -> set[str]:
    """Return the ids of the nodes that are in the cluster.

    Raises:
        RayError: the cluster does not answer.
    """
    return {str(node["NodeID"]) for node in all_nodes() if node["Alive"]}


def draining() -> Sequence[str]:
    """Return the ids of nodes that Ray is emptying."""
    # Private in Ray 2.60, where Serve itself asks so; without it a draining node is checked too.
    state = getattr(getattr(ray, "_private", None), "state", None)
    ask: Callable[[], Mapping[str, int]] | None = getattr(
        getattr(state, "state", None), "get_draining_nodes", None
    )
    try:
        return list(ask()) if ask is not None else []
    except (RayError, RuntimeError):
        return []


def goal_applications() -> list[ServeApplicationSchema]:
    """Return the applications that Serve is rolling out; none if Serve is not running."""
    from ray.serve._private.constants import (  # noqa: PLC0415 (private in Ray 2.60)
        SERVE_CONTROLLER_NAME,
        SERVE_NAMESPACE,
    )

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        goal: Any = ray.get(controller.get_app_configs.remote(), timeout=CONTROLLER_TIMEOUT_S)
    except (ValueError, RayError):
        return []
    return list(goal.values())


def _is_of(application: ServeApplicationSchema, config: AppConfig) -> bool:
    try:
        # Compared as trees: a default that is written out is the same application.
        return parse_args(application.args) == config
    except ConfigError:
        return False


def _placement(application: ServeApplicationSchema, config: AppConfig) -> Placement | None:
    if not _is_of(application, config):
        return None
    return placement_of(config, application.runtime_env or {}, application.deployments)


def bundle_demands(
    bundles: Sequence[Mapping[str, float]],
    options: Mapping[str, Any],
    labels: Sequence[Mapping[str, str]] = (),
) -> tuple[Demand, ...]:
    """Return what each bundle of a replica's placement group asks of its node.

    Args:
        bundles: resources of each.
        options: the replica's `ray_actor_options`, whose labels count for all of them.
        labels: label selector of each bundle; one counts for all.
    """
    shared = dict(options.get("label_selector") or {})
    # Ray takes one selector for all bundles, or one for each.
    each = list(labels) * len(bundles) if len(labels) == 1 else list(labels)
    each += [{}] * (len(bundles) - len(each))
    return tuple(
        Demand(dict(bundle), {**shared, **own}) for bundle, own in zip(bundles, each, strict=True)
    )


def merged_runtime_env(
    application: Mapping[str, Any], deployment: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge as Serve 2.60 does: a deployment's keys win, but variables are combined."""
    merged = {**application, **deployment}
    variables = {**application.get("env_vars", {}), **deployment.get("env_vars", {})}
    return {**merged, "env_vars": variables} if variables else merged
