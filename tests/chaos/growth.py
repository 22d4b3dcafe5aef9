"""Does the service still grow with its load after a rollout that did not go through?

Serve stops the autoscaling of the version that serves when a build fails, and does not begin
again when the same config is applied once more (Ray 2.60). `serve-app deploy` proves before it
touches Serve, and goes back with a nudge; `serve-app rollback` repairs what a plain `serve deploy`
left.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from serve_app.config import ReplicaConfig
from serve_app.deployments.autoscaling import autoscaling
from tests.chaos.load import Load, failures
from tests.chaos.nodes import Setup
from tests.chaos.rollouts import CORRUPT, LLAMA, command, with_cut_weights
from tests.chaos.stage import Stage, stage_for
from tests.models import make_model

SETUP = Setup(("a", "b"), room=1, native=True, per_s=4.0, tokens=400)
# Of Serve's own metrics, so that a round takes seconds and not minutes.
QUICK = {"metrics_interval_s": 1, "look_back_period_s": 3}
SCALE = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 1}
DELAYS = {"upscale_delay_s": 0.5, "downscale_delay_s": 2}
GROWS_S, SHRINKS_S = 60.0, 120.0

Before = Callable[[], int | None]


def growth() -> dict[str, Any]:
    """Measure a service under the same load after each of five rollouts."""
    with TemporaryDirectory(prefix="chaos-") as scratch:
        model = make_model(Path(scratch) / "model", **LLAMA)
        with stage_for(SETUP, model, others=(with_cut_weights(model),)) as stage:
            rounds = _all(stage)
    return {
        "per_s": SETUP.per_s,
        "tokens": SETUP.tokens,
        "waited_s": GROWS_S,
        "rounds": rounds,
    }


def _all(stage: Stage) -> list[dict[str, Any]]:
    def deploy(repo_id: str | None = None, **changes: Any) -> int:
        return command(stage, "deploy", _config(stage, repo_id, **changes)).returncode

    def blocked() -> int:
        with stage.withdrawn("b"):
            return deploy(api={"max_queued_requests": 301})

    def blocked_past_us() -> None:
        with stage.withdrawn("b"):
            stage.service.put_app(_config(stage, api={"max_queued_requests": 302}))
            stage.service.wait("DEPLOY_FAILED", timeout_s=60)

    states: dict[str, Before] = {
        "`serve-app deploy`, done": deploy,
        "`serve-app deploy`, blocked": blocked,
        "`serve-app deploy` of cut weights, rolled back": lambda: deploy(CORRUPT),
        "plain `serve deploy`, its build blocked": blocked_past_us,
        "`serve-app rollback` after that": lambda: command(stage, "rollback").returncode,
    }
    return [_round(stage, name, before) for name, before in states.items()]


def _config(stage: Stage, repo_id: str | None = None, **changes: Any) -> dict[str, Any]:
    app = stage.config(**changes)
    app["args"]["replica"] |= SCALE | DELAYS
    app["args"]["model"] |= {"repo_id": repo_id} if repo_id else {}
    scale = autoscaling(ReplicaConfig(**app["args"]["replica"])) | QUICK
    app["deployments"] = [{"name": "LLMServer", "autoscaling_config": scale}]
    return app


def _round(stage: Stage, name: str, before: Before) -> dict[str, Any]:
    code = before()
    status = stage.reported_by_serve()["status"]
    _shrunk(stage, name)
    load = Load(stage.service.url, "chaos", per_s=SETUP.per_s, tokens=SETUP.tokens)
    with load:
        began = time.monotonic()
        grew = stage.wait_until(lambda: _running() == 2, GROWS_S)
        grown_s = round(time.monotonic() - began, 1) if grew else None
    _shrunk(stage, name)  # a failed build would keep the second replica too
    print(f"  {name}: {grown_s}", flush=True)
    return {
        "before": name,
        "exit_code": "" if code is None else code,
        "status": str(getattr(status, "value", status)),
        "grown_s": grown_s,
        "sent": len(load.answers),
        "failed": failures(load.answers),
    }


def _shrunk(stage: Stage, name: str) -> None:
    if not stage.wait_until(lambda: _running() == 1, SHRINKS_S):
        raise RuntimeError(f"{name}: still not one replica without load")


def _running() -> int:
    from serve_app.cluster.controller import replicas

    found = replicas("llm", timeout_s=5).get("LLMServer", ())
    return sum(str(getattr(r["state"], "value", r["state"])) == "RUNNING" for r in found)
