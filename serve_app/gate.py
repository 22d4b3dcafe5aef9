"""The gate for other people's Serve applications, by YAML or by one call.

    import_path: serve_app.gate:build        # the gate, then whatever `app` builds
    args:
      gate: {model: {repo_id: meta-llama/Llama-3.1-8B-Instruct}}
      app: {import_path: "ray.serve.llm:build_openai_app", args: {llm_configs: [...]}}

    def build(args):                         # or from a builder of one's own
        commit = require_repo_access("meta-llama/Llama-3.1-8B-Instruct", replica={"num_gpus": 1})
        ...  # any Serve application; load exactly this commit

Run by `serve run` or `serve deploy`, a refusal ends the build with the table of all nodes in
`serve status`, and the version that served goes on serving. `check` asks from a notebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ray
import structlog
from ray import serve
from ray.serve import Application

from serve_app.access.preflight import (
    RolloutBlocked,
    check_this_machine,
    preflight,
    require_access,
)
from serve_app.access.verdict import Verdict
from serve_app.cluster.application import build as build_application
from serve_app.cluster.application import placements
from serve_app.cluster.placement import Placement, applications_with
from serve_app.config import AppConfig, config_hash, parse_args
from serve_app.deployments.grant_watch import GrantWatch
from serve_app.errors import ConfigError
from serve_app.gate_config import GATE_IMPORT_PATH, GatedApp, parse_gated
from serve_app.telemetry import logs, rollout_history
from serve_app.weights.prefetch import lacking, line, prefetch

log = structlog.get_logger()

FETCH_TIMEOUT_S = 4 * 3600.0  # of a large model over a slow line; Serve lets a build take so long


def require_repo_access(
    repo_id: str,
    *,
    revision: str = "main",
    replica: Mapping[str, Any] | None = None,
    access: Mapping[str, Any] | None = None,
) -> str:
    """Prove that every node that may host a replica reads this repository's weights.

    The nodes are asked in the builder's own environment, with the token that huggingface_hub
    finds there. That is proof only if the replicas send the same: an environment that a
    deployment sets for itself is not seen, and `ray.serve.llm` (Ray 2.60) hands the token of
    one process to its workers on other nodes. Give such an application one token everywhere.

    Args:
        repo_id: `owner/name` on the Hub.
        revision: branch, tag or commit.
        replica: what one replica needs, by the keys of the config's `replica:`; one GPU by
            default.
        access: which token, which Hub, which limits, by the keys of the config's `access:`.

    Returns:
        The commit that was proven, 40 hex digits. Load this one, not the branch.

    Raises:
        RolloutBlocked: a node was refused or could not prove its access, or an argument is
            wrong; the message is meant for `serve status`.
    """
    try:
        config = _question(repo_id, revision, replica, access)
    except ConfigError as error:
        raise RolloutBlocked(f"The gate was asked wrongly:\n{error.message}") from None
    verdict = require_access(config, access_only=True)
    if verdict.commit is None:
        raise RolloutBlocked(f"No commit of {repo_id} was proven.\n{verdict.table()}")
    return verdict.commit


def check(
    repo_id: str,
    *,
    revision: str = "main",
    replica: Mapping[str, Any] | None = None,
    access: Mapping[str, Any] | None = None,
) -> Verdict:
    """Ask every node of the connected cluster, or without one this machine; nothing is blocked.

    A notebook shows the verdict as a table.

    Args:
        repo_id: `owner/name` on the Hub.
        revision: branch, tag or commit.
        replica: what one replica needs, by the keys of the config's `replica:`.
        access: which token, which Hub, which limits, by the keys of the config's `access:`.

    Raises:
        ConfigError: an argument is wrong.
    """
    config = _question(repo_id, revision, replica, access)
    if not ray.is_initialized():
        return check_this_machine(config, access_only=True)
    return preflight(config, access_only=True)


def build(args: dict[str, Any]) -> Application:
    """Prove access wherever an application's deployments will run, then build that application.

    Its builder is called twice: with the revision as it was asked for, to see where the
    deployments go and with which environment, and after the gate with the commit.

    Args:
        args: see `GatedApp`.

    Raises:
        RolloutBlocked: the args are wrong, or a node could not prove its access.
        Exception: whatever the builder raises.
    """
    try:
        gated = parse_gated(args)
        names, asked = _placements(gated, args)
    except ConfigError as error:
        raise RolloutBlocked(f"The config is wrong:\n{error.message}") from None
    logs.configure_serve(gated.config.logging)
    verdict = preflight(gated.config, placements=asked, access_only=True)
    rollout_history.record_gate(names, verdict, config_hash(gated))
    if not verdict.approved:
        log.error("rollout.blocked", repo_id=verdict.repo_id)
        raise RolloutBlocked(verdict.table())
    commit = verdict.commit or gated.gate.model.revision  # a local directory has no commit
    path = _fetched(gated, verdict, asked) if gated.wants_path else ""
    return build_application(gated.app.import_path, gated.builder_args(commit, path))


def watch(args: dict[str, Any]) -> Application:
    """Build the application that re-checks the grants of a gated one beside it.

    Args:
        args: `application`, its name in Serve.

    Raises:
        RolloutBlocked: the args are something else.
    """
    if set(args) != {"application"} or not isinstance(args["application"], str):
        raise RolloutBlocked("The config is wrong:\nserve_app.gate:watch takes `application: NAME`")
    options: dict[str, Any] = {"name": "GrantWatch", "ray_actor_options": {"num_cpus": 0}}
    deployment: Any = serve.deployment(**options)(GrantWatch)
    application: Application = deployment.bind(args["application"])
    return application


def _placements(gated: GatedApp, args: Mapping[str, Any]) -> tuple[list[str], list[Placement]]:
    """Return the names of the applications that Serve builds from these args, and their places."""
    source = gated.app
    built = build_application(source.import_path, gated.builder_args(gated.gate.model.revision))
    applications = applications_with(GATE_IMPORT_PATH, args)
    found: list[Placement] = []
    rolled_out = [(each.runtime_env, each.deployments) for each in applications]
    for runtime_env, overrides in rolled_out or [({}, [])]:
        places = placements(
            built, names=gated.gate.deployments, runtime_env=runtime_env, overrides=overrides
        )
        found += [place for place in places if place not in found]
    return [application.name for application in applications], found


def _fetched(gated: GatedApp, verdict: Verdict, asked: Sequence[Placement]) -> str:
    """Fetch the model onto every node and return its directory, which has to be one for all.

    Raises:
        RolloutBlocked: a node does not have it, or has it elsewhere.
    """
    model = gated.gate.model
    if model.path is not None or verdict.commit is None:
        return str(model.path or "")
    results = prefetch(model, gated.gate.access, verdict.commit, asked, timeout_s=FETCH_TIMEOUT_S)
    if absent := lacking(results):
        lines = "\n".join(line(result) for result in absent)
        raise RolloutBlocked(
            f"The weights are not on {len(absent)} of {len(results)} nodes:\n{lines}"
        )
    places = {result.directory: result.node for result in results}
    if len(places) != 1:
        named = ", ".join(f"{path} on {node}" for path, node in sorted(places.items()))
        raise RolloutBlocked(
            f"The nodes have the model in different directories ({named}): set the same HF_HOME"
        )
    return next(iter(places))


def _question(
    repo_id: str,
    revision: str,
    replica: Mapping[str, Any] | None,
    access: Mapping[str, Any] | None,
) -> AppConfig:
    model = {"repo_id": repo_id, "revision": revision}
    args = {"model": model, "replica": dict(replica or {}), "access": dict(access or {})}
    return parse_args(args)
