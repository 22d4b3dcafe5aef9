"""The gate before a rollout: every node that may host a replica proves its own access.

Serve's builder task lands on any node with that node's token, so its own token proves nothing:
it sends a probe to each node, in the environment that the replicas will have, and decides over
the answers. The replicas' requirements and environment are read from the config that the Serve
controller is rolling out, because a deployment's overrides there never reach the builder.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    RayError,
    RayTaskError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.serve.exceptions import RayServeException
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.access.collect import Collection, Lost, failed
from serve_app.access.hub import endpoint_of
from serve_app.access.nodes import Node, eligible, shortage
from serve_app.access.placement import (
    Placement,
    all_nodes,
    asked_by,
    draining,
    find_cluster,
    placements_of,
)
from serve_app.access.prove import prove_here, prove_later
from serve_app.access.report import sanitise
from serve_app.access.verdict import NodeVerdict, Verdict
from serve_app.config import AccessConfig, AppConfig, ModelConfig
from serve_app.errors import ConfigError

# A function of `prove.py`: a node that runs it imports neither this file nor Serve nor torch.
_PROBE = ray.remote(num_cpus=0, num_gpus=0, max_retries=0)(prove_later)
RESULT_TIMEOUT_S = 5.0  # of an answer that has arrived; its owner may die in between


class RolloutBlocked(RayServeException):
    """Ends a build with exactly this text in `serve status`, without a retry.

    Serve shows the message of a `RayServeException` as it is; any other exception is a
    traceback, after three more builds.
    """


def require_access(config: AppConfig) -> Verdict:
    """Return the verdict of the whole cluster if it is a yes; call this first in a builder.

    Raises:
        RolloutBlocked: a node was refused, or could not prove its access; the message is the
            whole table.
    """
    verdict = preflight(config)
    if not verdict.approved:
        raise RolloutBlocked(verdict.table())
    return verdict


def preflight(config: AppConfig, *, placements: Sequence[Placement] | None = None) -> Verdict:
    """Probe every node of the connected cluster that may host a replica.

    Takes `access.deadline_s` at the most, whatever the network and the nodes do.

    Args:
        config: the application.
        placements: where its replicas may go; default: what the Serve controller is rolling
            out for these args, or what the config itself asks for.
    """
    began = time.monotonic()
    verdicts: list[NodeVerdict] = []
    commit, requests = None, 0
    for placement in placements or placements_of(config):
        probes = RayProbes(config.model, config.access, placement)
        left_s = began + config.access.deadline_s - time.monotonic()
        collection = Collection(probes, deadline_s=max(1.0, left_s))
        verdicts += collection.run() or [_nowhere(placement)]
        commit = commit or collection.commit
        requests += collection.hub_requests
    return _decide(config, verdicts, commit, requests, time.monotonic() - began)


def check_cluster(
    config: AppConfig, *, runtime_env: Mapping[str, Any] | None = None, address: str | None = None
) -> Verdict | None:
    """Run the gate from outside, connecting to a cluster for as long as it takes.

    Args:
        config: the application.
        runtime_env: of the application, as the Serve config has it.
        address: of the cluster; None takes RAY_ADDRESS, or what `ray start` recorded here.

    Returns:
        The verdict; None if no cluster is named in any of these ways.

    Raises:
        ConfigError: there is no cluster at the address.
    """
    asked = asked_by(config)
    if ray.is_initialized():
        return preflight(config, placements=[Placement(asked.demands, dict(runtime_env or {}))])
    found = find_cluster(address)
    if found is None:
        return None
    try:
        ray.init(
            address=found,
            runtime_env=dict(runtime_env or {}) or None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"no Ray cluster at {found}: {sanitise(str(error))}") from None
    try:
        # The job carries the environment: only a job may upload a local working directory.
        return preflight(config, placements=[asked])
    finally:
        ray.shutdown()


def check_this_machine(config: AppConfig) -> Verdict:
    """Run the gate for this machine alone, without Ray."""
    began = time.monotonic()
    verdict = prove_here(config.model, config.access)
    return _decide(
        config, [verdict], verdict.commit, verdict.hub_requests, time.monotonic() - began
    )


class RayProbes:
    """Probes as Ray tasks that need no resources and are bound to their node.

    Args:
        model: what is to be read.
        access: which token, which Hub, which limits.
        placement: which nodes count, and the environment of the probes.
    """

    def __init__(self, model: ModelConfig, access: AccessConfig, placement: Placement) -> None:
        self._model = model
        self._access = access
        self._placement = placement

    def nodes(self) -> list[Node]:
        """Return the nodes that may host a replica now."""
        return eligible(all_nodes(), self._placement.demands, draining())

    def launch(
        self, node: Node, *, commit: str | None, hint: NodeVerdict | None, delay_s: float
    ) -> ray.ObjectRef[NodeVerdict]:
        """Start a probe on a node and return at once."""
        task = _PROBE.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False),
            runtime_env=dict(self._placement.runtime_env) or None,
        )
        ref: ray.ObjectRef[NodeVerdict] = task.remote(
            self._model, self._access, commit, hint, delay_s
        )
        return ref

    def wait(
        self, refs: list[ray.ObjectRef[NodeVerdict]], timeout_s: float
    ) -> list[ray.ObjectRef[NodeVerdict]]:
        """Return those that have ended, after the timeout at the latest."""
        done, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s, fetch_local=False)
        return list(done)

    def result(self, ref: ray.ObjectRef[NodeVerdict]) -> NodeVerdict:
        """Return the answer of a probe that has ended.

        Raises:
            Lost: the node, its worker or its environment failed.
        """
        try:
            answer = ray.get(ref, timeout=RESULT_TIMEOUT_S)
        except GetTimeoutError:
            raise Lost("the node answered and was lost before its answer arrived") from None
        except RayTaskError as error:
            kind = type(error.cause).__name__
            raise Lost(f"the probe could not run there ({kind}); is serve_app there?") from None
        except RayError as error:
            raise Lost(_loss(error)) from None
        if not isinstance(answer, NodeVerdict):
            raise Lost("another version of serve_app answered there")
        return answer

    def cancel(self, ref: ray.ObjectRef[NodeVerdict]) -> None:
        """Stop a probe; it would end by its own limits too."""
        ray.cancel(ref, force=True)


def _loss(error: RayError) -> str:
    if isinstance(error, TaskUnschedulableError | NodeDiedError):
        return "the node left the cluster during the check"
    if isinstance(error, WorkerCrashedError):
        return "the process of the probe died there (memory?)"
    first = str(error).strip().partition("\n")[0]
    return sanitise(f"{type(error).__name__}: {first}", limit=200)


def _decide(
    config: AppConfig,
    verdicts: list[NodeVerdict],
    commit: str | None,
    hub_requests: int,
    duration_s: float,
) -> Verdict:
    is_local = config.model.path is not None
    return Verdict(
        repo_id=str(config.model.path or config.model.repo_id),
        revision=config.model.revision,
        commit=commit,
        endpoint="no Hub" if is_local else endpoint_of(config.access),
        duration_s=duration_s,
        nodes=tuple(verdicts),
        hub_requests=hub_requests,
        is_local=is_local,
    )


def _nowhere(placement: Placement) -> NodeVerdict:
    verdict = failed(Node("", "(no node)"), shortage(all_nodes(), placement.demands))
    sentence = "Start a node that a replica fits on, or ask for less under `replica:`."
    return NodeVerdict("", verdict.node_name, verdict.outcome, sentence, None, verdict.hub_message)
