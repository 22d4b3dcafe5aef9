"""The re-check while serving, for an application of somebody else behind the gate.

A small application of its own beside it: what it watches is not touched, and restarts for nothing
that happens here. It answers with the last verdict, exports the same metrics as our own ingress
and records in the history who lost or regained a grant.
"""

from __future__ import annotations

import asyncio
from typing import Any

import structlog
from ray.serve.schema import ServeApplicationSchema

from serve_app.access.preflight import preflight
from serve_app.access.recheck import Watch
from serve_app.access.verdict import Verdict
from serve_app.cluster.application import described
from serve_app.cluster.placement import goal_applications
from serve_app.deployments.status import living_nodes
from serve_app.errors import ConfigError
from serve_app.gate_config import GATE_IMPORT_PATH, parse_gated
from serve_app.telemetry import logs, rollout_history
from serve_app.telemetry.metrics import AccessMetrics
from serve_app.telemetry.rollout_history import What

log = structlog.get_logger()


class GrantWatch:
    """Asks every node again, at the interval of the application's own `gate.access`.

    Args:
        application: name of an application that `serve_app.gate:build` builds.

    Raises:
        ConfigError: no such application serves; Serve tries again.
    """

    async def __init__(self, application: str) -> None:  # type: ignore[misc]  # Serve awaits it
        self._application = application
        gated = parse_gated(_goal_of(application).args)
        logs.configure_serve(gated.config.logging)
        first = await asyncio.to_thread(recheck, application)
        access = AccessMetrics()
        self._watch = Watch(
            self._recheck,
            first,
            interval_s=gated.gate.access.watch_interval_s,
            on_verdict=access.show,
        )
        loop = asyncio.get_running_loop()
        self._jobs = [
            loop.create_task(job) for job in (self._watch.run(), access.keep(living_nodes))
        ]

    async def __call__(self, request: Any) -> dict[str, Any]:  # noqa: ARG002 (every path is one)
        """Return the last verdict, as `/access` of our own ingress shows it."""
        return self._watch.snapshot()

    def __del__(self) -> None:
        """Stop asking."""
        for job in getattr(self, "_jobs", ()):
            job.cancel()

    def _recheck(self) -> Verdict:
        try:
            return recheck(self._application)
        except ConfigError as error:  # removed, or replaced by another: what was known stays shown
            log.warning("access.not_rechecked", application=self._application, reason=error.message)
            return self._watch.verdict


def recheck(application: str) -> Verdict:
    """Ask every node again about the commit that the gate let through last.

    Raises:
        ConfigError: the application does not serve, or its builder does not run.
    """
    goal = _goal_of(application)
    gated = parse_gated(goal.args)
    entries = [e for e in rollout_history.entries(application) if e.what is What.APPROVED]
    commit = (entries[-1].commit if entries else None) or gated.gate.model.revision
    places = described(gated, commit, goal.runtime_env or {}, goal.deployments)
    config = gated.config.at_commit(commit)
    verdict = preflight(config, placements=places, access_only=True)
    rollout_history.record_grants(application, verdict)
    return verdict


def _goal_of(application: str) -> ServeApplicationSchema:
    for goal in goal_applications():
        if goal.name == application and goal.import_path == GATE_IMPORT_PATH:
            return goal
    raise ConfigError(f"no application {application} with import_path: {GATE_IMPORT_PATH} serves")
