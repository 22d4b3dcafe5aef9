"""START HERE: the config becomes a Serve application, if the gate agrees.

    args ─► parse_args ─► preflight ─► pinned commit ─► LLMServer ─► Ingress
            config/       access/           (main -> sha)    server.py    ingress.py

`serve run configs/x.yaml` calls `build_app` in a task on some node of the cluster. A refusal
raises `RolloutBlocked`, the one kind of exception that Serve shows as it is and does not
retry; the version that served goes on serving.
"""

from __future__ import annotations

import math
from typing import Any

import structlog
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from serve_app.access.preflight import RolloutBlocked, preflight
from serve_app.access.verdict import Verdict
from serve_app.cluster.placement import actor_options, applications_of
from serve_app.config import AppConfig, ReplicaConfig, config_hash, parse_args
from serve_app.deployments.autoscaling import autoscaling
from serve_app.deployments.ingress import Ingress
from serve_app.deployments.server import LLMServer
from serve_app.deployments.unrouted import Unrouted
from serve_app.engine.admission import Limits
from serve_app.errors import ConfigError
from serve_app.serve_config import INGRESS_DEPLOYMENT, SERVER_DEPLOYMENT
from serve_app.telemetry import logs, rollout_history

log = structlog.get_logger()

# Requests over its limits that a replica may hold at a time while it refuses them, so that the
# answer is its own, with the time to come back, and never a place in Serve's line.
REFUSED_AT_ONCE = 64
# Requests that an ingress may have open: no limit, since one would make `/health` wait in Serve's
# line behind bodies that come slowly. Each kind of work in there has its own: bodies on their way
# (`api/intake.py`), and what waits for replicas (`per_replica`), which is refused at once.
INGRESS_REQUESTS = 1_000_000
# Streams that one ingress carries: it is one process, and sends some 6,000 tokens a second
# (`scripts/bench_carry`), which are 50 a second for each of them.
INGRESS_STREAMS = 128
INGRESS_UPSCALE_S = 5.0  # a process that needs no GPU is there in seconds
# Streams that run when a replica has to stop get this long; a slow model's longest answer.
DRAIN_S = 120.0
PREFIX_ROUTER = "serve_app.deployments.prefix_router.PrefixRouter"
# Three failures in a row replace a replica: 15 s after it says so itself, a minute after it
# stopped to answer. Serve's own values make it 30 s and two minutes.
HEALTH: dict[str, Any] = {"health_check_period_s": 5.0, "health_check_timeout_s": 15.0}


def build_app(args: dict[str, Any]) -> Application:
    """Check the config, prove access on every node that may host a replica, then bind.

    Args:
        args: the `args:` of the Serve config, see `AppConfig`.

    Raises:
        RolloutBlocked: the config is wrong or a node could not prove its access; the message
            is complete and meant for a person.
    """
    return bind(*_proven(args))


def build_canary(args: dict[str, Any]) -> Application:
    """Do the same for a version that is tried beside another, whose ingress it shares.

    Args:
        args: see `build_app`.

    Raises:
        RolloutBlocked: as `build_app`.
    """
    root = serve.deployment(name="Unrouted", ray_actor_options={"num_cpus": 0}, **HEALTH)(Unrouted)
    return root.bind(bind_server(*_proven(args)))


def _proven(args: dict[str, Any]) -> tuple[AppConfig, Verdict]:
    """Return the config, and what the gate said of every node: yes."""
    try:
        config = parse_args(args)
    except ConfigError as error:
        raise RolloutBlocked(f"The config is wrong:\n{error.message}") from None
    logs.configure_serve(config.logging)
    verdict = preflight(config)
    # Serve does not give a builder the name of its application.
    hashed = config_hash(config)
    rollout_history.record_gate(applications_of(config), verdict, hashed)
    if not verdict.approved:
        log.error("rollout.blocked", repo_id=config.model.source)
        raise RolloutBlocked(verdict.table())
    log.info(
        "rollout.approved",
        repo_id=config.model.source,
        commit=verdict.commit,
        nodes=len(verdict.nodes),
        duration_s=verdict.duration_s,
        hub_requests=verdict.hub_requests,
        deferred=verdict.is_deferred,
    )
    return config, verdict


def bind(config: AppConfig, verdict: Verdict) -> Application:
    """Bind the two deployments to the commits that the gate has proven."""
    config = config.with_adapters_at(verdict.commits)
    ingress = serve.deployment(
        name=INGRESS_DEPLOYMENT,
        **_ingress_scale(config),
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_S,
        **HEALTH,
        max_surge_percent=100,
        logging_config=logs.serve_logging(config.logging),
    )(serve.ingress()(Ingress))
    return ingress.bind(bind_server(config, verdict), config, verdict)


def bind_server(config: AppConfig, verdict: Verdict) -> Application:
    """Bind the replicas alone."""
    config = config.with_adapters_at(verdict.commits)
    limits = Limits.of(config.engine, config.api)
    per_replica = limits.most + REFUSED_AT_ONCE
    server = serve.deployment(
        name=SERVER_DEPLOYMENT,
        ray_actor_options=actor_options(config.replica),
        max_ongoing_requests=per_replica,
        # Waiting in an ingress while no replica has room, or while there is none. Serve counts
        # what is on its way to a replica too, so fewer would refuse a burst into an idle one.
        max_queued_requests=per_replica,
        graceful_shutdown_timeout_s=DRAIN_S,
        **HEALTH,
        max_surge_percent=100,  # Serve's default stops the old replica before the new one is up
        logging_config=logs.serve_logging(config.logging),
        **_scale(config.replica),
        **_routing(config.replica),
    )(LLMServer)
    return server.bind(config, verdict.commit)


def _ingress_scale(config: AppConfig) -> dict[str, Any]:
    """Let ingresses grow with the streams that are open, up to what all replicas can run."""
    replicas = config.replica.max_replicas
    # An ingress that is lost cuts the streams of all replicas; two share them.
    least = min(2, replicas)
    most = math.ceil(replicas * config.engine.max_running_requests / INGRESS_STREAMS)
    if most <= least:
        return {"num_replicas": least}
    return {
        "autoscaling_config": {
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": INGRESS_STREAMS,
            "upscale_delay_s": INGRESS_UPSCALE_S,
        }
    }


def _scale(replica: ReplicaConfig) -> dict[str, Any]:
    if replica.min_replicas == replica.max_replicas:
        return {"num_replicas": replica.max_replicas}
    return {"autoscaling_config": autoscaling(replica)}


def _routing(replica: ReplicaConfig) -> dict[str, Any]:
    if replica.routing == "balanced":
        return {}  # Serve's own: the shorter line of two replicas
    # By name: what it is made of is alpha in Ray, and nobody else needs it.
    router = RequestRouterConfig(request_router_class=PREFIX_ROUTER)  # type: ignore[arg-type]
    return {"request_router_config": router}
