"""Somebody else's Serve application: built as Serve builds it, and where its deployments go."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray._common.utils import import_attr  # private in Ray 2.60, as is Serve's way to build
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app
from ray.serve.schema import DeploymentSchema

from serve_app.cluster.connection import connected
from serve_app.cluster.nodes import demand_of
from serve_app.cluster.placement import (
    Placement,
    bundle_demands,
    merged_runtime_env,
    placement_of,
)
from serve_app.cluster.tasks import node_task
from serve_app.errors import ConfigError
from serve_app.gate_config import GatedApp
from serve_app.serve_config import ServedApp

# What a replica's process does when it starts, and who watches it, is no part of its access; the
# builder of ray.serve.llm sets such a hook, which would import an engine into each probe.
NOT_FOR_PROBES = frozenset({"worker_process_setup_hook", "nsight", "_nsight"})
BUILD_TIMEOUT_S = 120.0  # a builder may import an engine


def build(import_path: str, args: Mapping[str, Any]) -> Application:
    """Import a builder, or an application, and build it.

    Args:
        import_path: `module:builder`; an application takes no args.
        args: of the builder; a builder that declares a pydantic model gets one.

    Raises:
        Exception: whatever the builder raises.
    """
    application: Application = call_user_app_builder_with_args_if_necessary(
        import_attr(import_path), dict(args)
    )
    return application


def placements(
    application: Application,
    *,
    names: Collection[str] = (),
    runtime_env: Mapping[str, Any] | None = None,
    overrides: Sequence[DeploymentSchema] = (),
) -> list[Placement]:
    """Return where the deployments go that load the weights, each place once.

    Args:
        application: as its builder returned it.
        names: of the deployments; none means all that ask for a GPU, or else all.
        runtime_env: of the application, as the Serve config has it.
        overrides: of single deployments, as the Serve config has them.

    Raises:
        ConfigError: it has no deployment of such a name.
    """
    found = dict(_deployments(application, runtime_env or {}, overrides))
    if missing := sorted(set(names) - set(found)):
        raise ConfigError(
            f"gate.deployments: the application has no {', '.join(missing)}; "
            f"it has {', '.join(sorted(found))}",
            param="gate.deployments",
        )
    # Weights go where the GPUs are; a router beside them needs no grant.
    on_gpus = {name for name, place in found.items() if _asks_for_gpu(place)}
    chosen = [found[name] for name in found if name in (set(names) or on_gpus or set(found))]
    return [place for index, place in enumerate(chosen) if place not in chosen[:index]]


def _deployments(
    application: Application, runtime_env: Mapping[str, Any], overrides: Sequence[DeploymentSchema]
) -> Iterator[tuple[str, Placement]]:
    changed = {entry.name: entry.model_dump(exclude_unset=True) for entry in overrides}
    # Bound and not deployed: Serve's own way from an application to its deployments.
    for deployment in build_app(application, name="gated").deployments:
        replica = deployment._replica_config
        # As Serve does it: what the config says of a key takes the place of what the code said.
        own = changed.get(deployment.name, {})
        options: dict[str, Any] = own.get("ray_actor_options") or deployment.ray_actor_options or {}
        bundles = own.get("placement_group_bundles") or replica.placement_group_bundles or ()
        labels = (
            own.get("placement_group_bundle_label_selector")
            or replica.placement_group_bundle_label_selector
            or ()
        )
        demands = bundle_demands(bundles, options, labels) or (demand_of(options),)
        environment = merged_runtime_env(runtime_env, options.get("runtime_env") or {})
        asked = {key: value for key, value in environment.items() if key not in NOT_FOR_PROBES}
        yield deployment.name, Placement(demands, asked)


def _asks_for_gpu(placement: Placement) -> bool:
    return any(demand.resources.get("GPU") for demand in placement.demands)


def described(
    gated: GatedApp,
    commit: str,
    runtime_env: Mapping[str, Any],
    overrides: Sequence[DeploymentSchema],
) -> list[Placement]:
    """Return where an application's weights will be loaded, built in a task on the cluster.

    For whoever is not its builder: that may be importable in its own environment alone.

    Args:
        gated: the application.
        commit: what takes the place of the commit.
        runtime_env: of the application, as far as this job does not have it already.
        overrides: of single deployments, as the Serve config has them.

    Raises:
        ConfigError: as `placements`, or the builder failed.
    """
    source, names = gated.app, gated.gate.deployments
    # A task, because the builder may import what only its own environment has.
    task = node_task(_describe).options(runtime_env=dict(runtime_env) or None)
    args = gated.builder_args(commit)
    ref = task.remote(source.import_path, args, names, dict(runtime_env), tuple(overrides))
    try:
        answer: list[Placement] | str = ray.get(ref, timeout=BUILD_TIMEOUT_S)
    except RayError as error:
        kind = type(error).__name__
        raise ConfigError(f"the builder {source.import_path} did not run: {kind}") from None
    # As a text, since an exception of somebody else's class may not unpickle here.
    if isinstance(answer, str):
        raise ConfigError(answer)
    return answer


@contextmanager
def connected_places(app: ServedApp, address: str | None) -> Iterator[list[Placement] | None]:
    """Connect to a cluster for as long as it takes, unless this process is connected already.

    Args:
        app: an application of a Serve config.
        address: of the cluster; None takes RAY_ADDRESS, or what `ray start` recorded here.

    Yields:
        Where its weights will be loaded; None if no cluster is named in any of these ways.

    Raises:
        ConfigError: there is no cluster at the address, or the builder of an application that is
            not ours does not run there.
    """
    env, overrides, gated = app.runtime_env, app.deployments, app.gated
    asked = Placement((), env) if gated else placement_of(app.config, env, overrides)
    with connected(asked, env, address) as placement:
        if placement is None:
            yield None
        elif gated is None:
            yield [placement]
        else:
            revision = gated.gate.model.revision
            yield described(gated, revision, placement.runtime_env, overrides)


def _describe(
    import_path: str,
    args: dict[str, Any],
    names: tuple[str, ...],
    runtime_env: dict[str, Any],
    overrides: tuple[DeploymentSchema, ...],
) -> list[Placement] | str:
    """Return the placements, or what went wrong in one sentence without the builder's values."""
    try:
        application = build(import_path, args)
        return placements(application, names=names, runtime_env=runtime_env, overrides=overrides)
    except ConfigError as error:
        return error.message
    except Exception as error:  # noqa: BLE001 (somebody else's code)
        return f"the builder {import_path} failed: {type(error).__name__}"
