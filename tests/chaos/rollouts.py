"""Four rollouts one after the other under one steady load, and what each cost the clients.

Driven by the commands as a person gives them: `serve-app deploy` and `serve-app rollback`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from scripts.local_hub import Repo
from tests.chaos.load import OK, Answer, failures
from tests.chaos.nodes import Setup
from tests.chaos.stage import Stage, stage_for
from tests.models import make_model

CORRUPT = "acme/corrupt"
QUIET_S = 5.0  # of load before and after each
LIMIT_S = 300.0
ENDS = ("done: ", "rolled back: ", "Access BLOCKED")  # words of the line that says how it ended
SETUP = Setup(("a", "b"), room=2, native=True, per_s=20.0, tokens=32)
LLAMA = {"num_hidden_layers": 3}  # what the compiled forward knows


@dataclass(frozen=True, slots=True)
class Rollout:
    """One rollout and the window of load around it, on the monotonic clock."""

    name: str
    began: float
    ended: float
    exit_code: int
    said: str


def rollouts() -> dict[str, Any]:
    """A good, a blocked and a failing deploy and a rollback, under 20 streams a second."""
    with TemporaryDirectory(prefix="chaos-") as scratch:
        model = make_model(Path(scratch) / "model", **LLAMA)
        broken = with_cut_weights(model)
        with stage_for(SETUP, model, others=(broken,)) as stage:
            done = _all(stage)
            answers = stage.load.answers
    return {
        "per_s": SETUP.per_s,
        "tokens": SETUP.tokens,
        "rollouts": [_row(rollout, answers) for rollout in done],
    }


def _all(stage: Stage) -> list[Rollout]:
    """Run them; the first deploy, before the load, makes the version that the second changes."""
    first = command(stage, "deploy", stage.config())
    if first.returncode != 0:
        raise RuntimeError(first.stderr)

    def blocked() -> subprocess.CompletedProcess[str]:
        with stage.withdrawn("b"):
            return command(stage, "deploy", stage.config(api={"max_queued_requests": 301}))

    def corrupt() -> subprocess.CompletedProcess[str]:
        config = stage.config()
        config["args"]["model"]["repo_id"] = CORRUPT
        return command(stage, "deploy", config)

    good = stage.config(api={"max_queued_requests": 300})
    kinds: dict[str, Callable[[], subprocess.CompletedProcess[str]]] = {
        "good": lambda: command(stage, "deploy", good),
        "blocked, one node's token has no grant": blocked,
        "failing, the weights are cut short": corrupt,
        "rollback": lambda: command(stage, "rollback"),
    }
    with stage.load:
        return [_under_load(name, roll) for name, roll in kinds.items()]


def _under_load(name: str, roll: Callable[[], subprocess.CompletedProcess[str]]) -> Rollout:
    began = time.monotonic()
    time.sleep(QUIET_S)
    result = roll()
    time.sleep(QUIET_S)
    lines = f"{result.stdout}\n{result.stderr}".splitlines()
    said = next((line for line in lines if any(end in line for end in ENDS)), "nothing")
    return Rollout(name, began, time.monotonic(), result.returncode, said)


def command(
    stage: Stage, name: str, config: dict[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `deploy` or `rollback` as a person does."""
    given = ["--timeout", "2m", "--address", stage.cluster.address]
    if config is not None:
        path = stage.homes["a"] / "app.yaml"
        http = {"host": "127.0.0.1", "port": stage.service.port}
        path.write_text(yaml.safe_dump({"http_options": http, "applications": [config]}))
        given = [str(path), *given]
    command = [sys.executable, "-m", "serve_app", name, *given]
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)


def with_cut_weights(model: Path) -> Repo:
    """Return a repository whose weights lack their end; its hashes are right."""
    files = {str(path.relative_to(model)): path.read_bytes() for path in model.iterdir()}
    weights = files["model.safetensors"]
    files["model.safetensors"] = weights[: len(weights) // 2]
    return Repo(CORRUPT, files, gated="manual")


def _row(rollout: Rollout, answers: list[Answer]) -> dict[str, Any]:
    meant = [a for a in answers if rollout.began <= a.began < rollout.ended]
    seconds = sorted(a.ended - a.began for a in meant if a.kind == OK)
    return {
        "rollout": rollout.name,
        "exit_code": rollout.exit_code,
        "said": rollout.said,
        "seconds": round(rollout.ended - rollout.began - 2 * QUIET_S, 1),
        "sent": len(meant),
        "failed": failures(meant),
        "p50_s": round(seconds[len(seconds) // 2], 3),
        "p99_s": round(seconds[int(len(seconds) * 0.99)], 3),
    }
