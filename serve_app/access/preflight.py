"""The gate before a rollout: every node that may host a replica proves its own access.

Serve's builder task lands on any node with that node's token, so its own token proves nothing:
it sends a probe to each node, in the environment that the replicas will have, and decides over
the answers. The replicas' requirements and environment are read from the config that the Serve
controller is rolling out, because a deployment's overrides there never reach the builder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import ray
from ray.serve.exceptions import RayServeException

from serve_app.access.collect import Collection, failed
from serve_app.access.hub.probe import endpoint_of
from serve_app.access.node_check import ADAPTER_LOADER, loader_of, prove_here, prove_later
from serve_app.access.verdict import NodeVerdict, Verdict
from serve_app.checkpoint.runnable import Loader
from serve_app.cluster.application import connected_places
from serve_app.cluster.nodes import Node, shortage
from serve_app.cluster.placement import Placement, all_nodes, placements_of
from serve_app.cluster.tasks import NodeTasks, node_task
from serve_app.config import AccessConfig, AppConfig, ModelConfig
from serve_app.serve_config import ServedApp

# Adapters that are proven at once: on each node that is a process each, whose start takes a core
# for most of a second. The next ones find it there.
AT_ONCE = 8
# Who is asked where the config does not say it: of a store the nodes' own settings may.
_STORES = {"s3": "S3", "gs": "Google Cloud Storage", "modelscope": "ModelScope"}
# A function of `node_check.py`: a node that runs it imports neither this file nor Serve nor torch.
_PROBE = node_task(prove_later)


class RolloutBlocked(RayServeException):
    """Ends a build with exactly this text in `serve status`, without a retry.

    Serve shows the message of a `RayServeException` as it is; any other exception is a
    traceback, after three more builds.
    """


def require_access(config: AppConfig, *, access_only: bool = False) -> Verdict:
    """Return the verdict of the whole cluster if it is a yes; call this first in a builder.

    Args:
        config: the application.
        access_only: another engine than ours loads the weights, so what it can load is its affair.

    Raises:
        RolloutBlocked: a node was refused, or could not prove its access; the message is the
            whole table.
    """
    verdict = preflight(config, access_only=access_only)
    if not verdict.approved:
        raise RolloutBlocked(verdict.table())
    return verdict


def preflight(
    config: AppConfig,
    *,
    placements: Sequence[Placement] | None = None,
    access_only: bool = False,
    only: frozenset[str] | None = None,
) -> Verdict:
    """Probe every node of the connected cluster that may host a replica.

    Takes `access.deadline_s` at the most, whatever the network and the nodes do; a second more
    for every `AT_ONCE` adapters.

    Args:
        config: the application.
        placements: where its replicas may go; default: what the Serve controller is rolling
            out for these args, or what the config itself asks for.
        access_only: do not ask whether our engine can load what is there.
        only: ids of nodes; ask no others, and none of them that no replica may run on.
    """
    places = placements or placements_of(config)
    began = time.monotonic()
    return _of_all(
        config,
        lambda model, loader: _probe(model, config.access, places, loader, only, began),
        access_only=access_only,
        at_once=AT_ONCE,
    )


def _probe(
    model: ModelConfig,
    access: AccessConfig,
    placements: Sequence[Placement],
    loader: Loader | None,
    only: frozenset[str] | None,
    gate_began: float,
) -> Verdict:
    """Probe the nodes of some placements for one repository."""
    began = time.monotonic()
    verdicts: list[NodeVerdict] = []
    commit, requests = None, 0
    for placement in placements:
        probes = RayProbes(model, access, placement, loader, only)
        # One deadline for all places and adapters: a builder that takes long holds up every other
        # rollout.
        left_s = gate_began + access.deadline_s - time.monotonic()
        collection = Collection(probes, deadline_s=max(1.0, left_s))
        # Without a row nobody would have refused; with `only` the others' rows are kept.
        nowhere = [] if only is not None else [_nowhere(placement, access)]
        verdicts += collection.run() or nowhere
        commit = commit or collection.commit
        requests += collection.hub_requests
    if commit is None and any(verdict.deferred for verdict in verdicts):
        # Only what the branch means is asked from here: this node's grant is nobody else's.
        here = prove_here(model, access)
        commit, requests = here.commit, requests + here.hub_requests
        verdicts += [here] if commit is None and model.path is None else []
    return _decide(model, access, verdicts, commit, requests, time.monotonic() - began)


def check_cluster(app: ServedApp, address: str | None = None) -> Verdict | None:
    """Run the gate from outside, connecting to a cluster for as long as it takes.

    Args:
        app: an application of a Serve config.
        address: of the cluster; None takes RAY_ADDRESS, or what `ray start` recorded here.

    Returns:
        The verdict; None if no cluster is named in any of these ways.

    Raises:
        ConfigError: there is no cluster at the address, or the builder does not run there.
    """
    with connected_places(app, address) as places:
        if places is None:
            return None
        return preflight(app.config, placements=places, access_only=app.access_only)


def check_this_machine(config: AppConfig, *, access_only: bool = False) -> Verdict:
    """Run the gate for this machine alone, without Ray; see `preflight`."""

    def prove(model: ModelConfig, loader: Loader | None) -> Verdict:
        began = time.monotonic()
        node = prove_here(model, config.access, loader=loader)
        duration_s = time.monotonic() - began
        return _decide(model, config.access, [node], node.commit, node.hub_requests, duration_s)

    at_once = len(config.model.parts)  # a thread each
    return _of_all(config, prove, access_only=access_only, at_once=at_once)


class RayProbes(NodeTasks[NodeVerdict]):
    """Probes as tasks on the nodes.

    Args:
        model: what is to be read.
        access: which token, which Hub, which limits.
        placement: which nodes count, and the environment of the probes.
        loader: what the replicas load with; None asks for access alone.
        only: ids of the nodes that count; None is all.
    """

    def __init__(
        self,
        model: ModelConfig,
        access: AccessConfig,
        placement: Placement,
        loader: Loader | None = None,
        only: frozenset[str] | None = None,
    ) -> None:
        super().__init__(_PROBE, NodeVerdict, placement)
        self._model = model
        self._access = access
        self._loader = loader
        self._only = only

    def nodes(self) -> list[Node]:
        """Return the nodes that may host a replica now."""
        only = self._only
        return [node for node in super().nodes() if only is None or node.node_id in only]

    def launch(
        self, node: Node, *, commit: str | None, hint: NodeVerdict | None, delay_s: float
    ) -> ray.ObjectRef[NodeVerdict]:
        """Start a probe on a node and return at once."""
        return self.start(node, self._model, self._access, commit, hint, delay_s, self._loader)


def _of_all(
    config: AppConfig,
    prove: Callable[[ModelConfig, Loader | None], Verdict],
    *,
    access_only: bool,
    at_once: int,
) -> Verdict:
    """Prove the model, and beside it the adapters, some at once."""
    model, *adapters = config.model.parts
    # The model stays on this thread, which is connected to Ray in any case.
    with ThreadPoolExecutor(at_once, thread_name_prefix="gate") as pool:
        proving = [pool.submit(prove, each, ADAPTER_LOADER) for each in adapters]
        verdict = prove(model, None if access_only else loader_of(config))
        found = {each.name: work.result() for each, work in zip(adapters, proving, strict=True)}
    return replace(verdict, adapters=found)


def _decide(
    model: ModelConfig,
    access: AccessConfig,
    verdicts: list[NodeVerdict],
    commit: str | None,
    hub_requests: int,
    duration_s: float,
) -> Verdict:
    is_local = model.path is not None
    return Verdict(
        repo_id=model.source,
        revision=model.revision,
        commit=commit,
        endpoint=_asked(model, access),
        duration_s=duration_s,
        nodes=tuple(verdicts),
        hub_requests=hub_requests,
        is_local=is_local,
    )


def _asked(model: ModelConfig, access: AccessConfig) -> str:
    """Return who was asked."""
    if model.path is not None:
        return "no Hub"
    if model.url is not None:
        return access.endpoint or _STORES[model.url.partition("://")[0]]
    return endpoint_of(access)


def _nowhere(placement: Placement, access: AccessConfig) -> NodeVerdict:
    verdict = failed(Node("", "(no node)"), shortage(all_nodes(), placement.demands))
    sentence = "Start a node that a replica fits on, or ask for less under `replica:`."
    if access.on_no_nodes == "defer":
        sentence = "Run `serve-app check` once a node is up; until then nothing is known."
    return replace(verdict, remedy=sentence, url=None, deferred=access.on_no_nodes == "defer")
