"""The re-check while serving, for an application of somebody else behind the gate.

A small application of its own beside it: what it watches is not touched, and restarts for nothing
that happens here. It answers with the last verdict, exports the same metrics as our own ingress
and records in the history who lost or regained a grant.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import structlog
from ray.exceptions import RayError
from ray.serve.schema import ServeApplicationSchema

from serve_app.access.file_watch import TOKEN, Change
from serve_app.access.preflight import preflight
from serve_app.access.recheck import AtOnce, Watch
from serve_app.access.verdict import Verdict
from serve_app.cluster.application import described
from serve_app.cluster.controller import replicas
from serve_app.cluster.placement import Placement, goal_applications, living_nodes
from serve_app.config import AppConfig
from serve_app.deployments.files import merged, record_change
from serve_app.deployments.jobs import Work, keep_running
from serve_app.deployments.node_files import NodeFiles
from serve_app.deployments.status import CONTROLLER_TIMEOUT_S
from serve_app.errors import ConfigError
from serve_app.gate_config import GATE_IMPORT_PATH, parse_gated
from serve_app.telemetry import logs, rollout_history
from serve_app.telemetry.metrics import AccessMetrics
from serve_app.telemetry.rollout_history import What

log = structlog.get_logger()


class GrantWatch:
    """Asks every node again, at the interval of the application's own `gate.access`.

    A node with a replica whose token file changed is asked within seconds.

    Args:
        application: name of an application that `serve_app.gate:build` builds.

    Raises:
        ConfigError: no such application serves; Serve tries again.
    """

    async def __init__(self, application: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self._application = application
        self._asked: tuple[AppConfig, list[Placement]] | None = None
        gated = parse_gated(_goal_of(application).args)
        logs.configure_serve(gated.config.logging)
        self._files = NodeFiles(self._hosts, self._changed)
        first = await asyncio.to_thread(self._ask)
        access = AccessMetrics()
        self._watch = Watch(
            self._recheck,
            first,
            interval_s=gated.gate.access.watch_interval_s,
            on_verdict=access.show,
            at_once=AtOnce(self._files.changed, self._recheck_nodes),
        )
        loop = asyncio.get_running_loop()
        jobs: dict[str, Work] = {
            "grants": self._watch.run,
            "nodes": partial(access.keep, living_nodes),
        }
        self._jobs = [loop.create_task(keep_running(job, name)) for name, job in jobs.items()]

    async def __call__(self, request: Any) -> dict[str, Any]:  # noqa: ARG002 (every path is one)
        """Return the last verdict, as `/access` of our own ingress shows it."""
        return self._watch.snapshot()

    def __del__(self) -> None:
        """Stop asking."""
        for job in getattr(self, "_jobs", ()):
            job.cancel()
        if files := getattr(self, "_files", None):
            files.stop()

    def _ask(self) -> Verdict:
        """Ask every node, and look at its files from now on."""
        now = asked(self._application)
        config, places = now
        if now != self._asked:
            self._asked = now
            self._files.place(config.access, places if config.model.sends_token else [])
        verdict = preflight(config, placements=places, access_only=True)
        rollout_history.record_grants(self._application, verdict)
        return verdict

    def _recheck(self) -> Verdict:
        try:
            return self._ask()
        except ConfigError as error:  # removed, or replaced by another: what was known stays shown
            log.warning("access.not_rechecked", application=self._application, reason=error.message)
            return self._watch.verdict

    def _recheck_nodes(self, before: Verdict, nodes: frozenset[str]) -> Verdict:
        if self._asked is None:
            return before
        config, places = self._asked
        found = preflight(config, placements=places, access_only=True, only=nodes)
        return merged(self._application, before, found)

    def _hosts(self) -> frozenset[str] | None:
        """Return the nodes that have a replica of the application; None if nobody answers."""
        try:
            found = replicas(self._application, CONTROLLER_TIMEOUT_S)
        except (RayError, ValueError, KeyError):
            return None
        nodes = (each["node_id"] for group in found.values() for each in group)
        return frozenset(node for node in nodes if node)

    def _changed(self, node_id: str, change: Change) -> None:
        log.info("access.file_changed", node_id=node_id, kind=change.kind, path=change.path)
        if change.kind == TOKEN:  # a fresh identity token comes every hour
            names = {node.node_id: node.node_name for node in self._watch.verdict.nodes}
            record_change(self._application, change, names.get(node_id, node_id))


def asked(application: str) -> tuple[AppConfig, list[Placement]]:
    """Return what is asked again, of the commit that the gate let through last, and where.

    Raises:
        ConfigError: the application does not serve, or its builder does not run.
    """
    goal = _goal_of(application)
    gated = parse_gated(goal.args)
    entries = [e for e in rollout_history.entries(application) if e.what is What.APPROVED]
    commit = (entries[-1].commit if entries else None) or gated.gate.model.revision
    places = described(gated, commit, goal.runtime_env or {}, goal.deployments)
    return gated.config.at_commit(commit), list(places)


def _goal_of(application: str) -> ServeApplicationSchema:
    for goal in goal_applications():
        if goal.name == application and goal.import_path == GATE_IMPORT_PATH:
            return goal
    raise ConfigError(f"no application {application} with import_path: {GATE_IMPORT_PATH} serves")
