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

from serve_app.access.preflight import preflight
from serve_app.access.recheck import Watch
from serve_app.access.verdict import Verdict
from serve_app.cluster.application import described
from serve_app.cluster.placement import goal_applications
from serve_app.config import AppConfig
from serve_app.deployments.status import living_nodes
from serve_app.errors import ConfigError
from serve_app.gate_config import GATE_IMPORT_PATH, GatedApp, parse_gated
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
        gated = _gated(application)
        logs.configure_serve(gated.config.logging)
        first = await asyncio.to_thread(recheck, application)
        access = AccessMetrics()
        self._watch = Watch(
            partial(_recheck_or, application, first),
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


def recheck(application: str) -> Verdict:
    """Ask every node again about the commit that the gate let through last.

    Raises:
        ConfigError: the application does not serve, or its builder does not run.
    """
    gated = _gated(application)
    entries = [e for e in rollout_history.entries(application) if e.what is What.APPROVED]
    commit = (entries[-1].commit if entries else None) or gated.gate.model.revision
    (goal,) = [goal for goal in goal_applications() if goal.name == application]
    places = described(gated, commit, goal.runtime_env or {}, goal.deployments)
    model = gated.gate.model.model_copy(update={"revision": commit})
    config: AppConfig = gated.config.model_copy(update={"model": model})
    verdict = preflight(config, placements=places, access_only=True)
    rollout_history.record_grants(application, verdict)
    return verdict


def _recheck_or(application: str, before: Verdict) -> Verdict:
    try:
        return recheck(application)
    except ConfigError as error:  # removed, or replaced by another: what was known stays shown
        log.warning("access.not_rechecked", application=application, reason=error.message)
        return before


def _gated(application: str) -> GatedApp:
    for goal in goal_applications():
        if goal.name == application and goal.import_path == GATE_IMPORT_PATH:
            return parse_gated(goal.args)
    raise ConfigError(f"no application {application} with import_path: {GATE_IMPORT_PATH} serves")
