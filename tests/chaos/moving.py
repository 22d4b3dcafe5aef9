"""Faults that meet something in motion: a replica that is being added, a rollout, the load."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import yaml

from scripts.local_hub import Behaviour
from serve_app.config import ReplicaConfig
from serve_app.deployments.autoscaling import autoscaling
from tests.chaos.load import OK, Load, failures
from tests.chaos.stage import LIMIT_S, Stage

EACH_S = 8.0  # how long the Hub stays at one fault
AWAY_S = 20.0  # between the end of the old token and the new one in its file
HUB_FAULTS = (Behaviour.server_error, Behaviour.hang, Behaviour.rate_limited)
# Of Serve's own metrics, so that growing takes seconds and not minutes.
QUICK = {"metrics_interval_s": 1, "look_back_period_s": 3}
SCALE = {
    "min_replicas": 1,
    "max_replicas": 4,
    "target_ongoing_requests": 0.5,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 2,
}
PEAK_PER_S, PEAK_TOKENS = 4.0, 300
GROWS_S, SHRINKS_S = 180.0, 180.0


def hub_fails_while_growing(stage: Stage) -> str:
    """The Hub answers 500, then hangs, then 429, 8 s each, while a second replica is added."""
    one = {replica.actor for replica in stage.replicas()}

    def add() -> None:
        stage.hub.set_outage(HUB_FAULTS[0])
        app = stage.config()
        app["deployments"] = [{"name": "LLMServer", "num_replicas": 2}]
        stage.service.put_app(app)

    stage.strike(add)
    early = False
    for fault in HUB_FAULTS:
        stage.hub.set_outage(fault)
        early = early or stage.wait_until(lambda: _running(stage) == 2, limit_s=EACH_S)
    lines = stage.service.logged("access.refused", "LLMServer")
    stage.hub.set_outage(None)
    over = time.monotonic()
    stage.recovered(lambda: _running(stage) == 2)
    if stage.recovered_at is None:
        return "the second replica does not come"
    said = ", ".join(sorted({line["outcome"] for line in lines})) or "nothing"
    same = one <= {replica.actor for replica in stage.replicas()}
    when = "came before the end" if early else f"runs {stage.recovered_at - over:.0f} s after it"
    kept = "stays" if same else "was restarted"
    return f"refused meanwhile: {len(lines)} ({said}); the second {when}; the first {kept}"


def token_rotated_in_a_rollout(stage: Stage) -> str:
    """All tokens are revoked while a rollout starts its replicas; 20 s later new ones are there."""
    path = stage.homes["a"] / "rotated.yaml"
    app = stage.config(api={"max_queued_requests": 101})
    http = {"host": "127.0.0.1", "port": stage.service.port}
    path.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
    command = [sys.executable, "-m", "serve_app", "deploy", str(path), "--timeout", "3m"]
    before = {replica.actor for replica in stage.replicas()}
    pipe = subprocess.PIPE
    deploying = subprocess.Popen(
        [*command, "--address", stage.cluster.address], stdout=pipe, stderr=pipe, text=True
    )
    begun = stage.wait_until(
        lambda: any(replica.actor not in before for replica in stage.replicas())
    )

    def revoke() -> None:
        for token in stage.tokens.values():
            stage.hub.set_behaviour(token, Behaviour.invalid)

    stage.strike(revoke, settle_s=0)
    time.sleep(AWAY_S)
    for name, home in stage.homes.items():
        (home / "secret").write_text(stage.hub.issue_token(account=name))
    out, err = deploying.communicate(timeout=2 * LIMIT_S)
    stage.recovered(stage.are_well)
    last = (out or err).strip().splitlines()[-1]
    refused = len(stage.service.logged("access.refused", "LLMServer"))
    where = "" if begun else "too late: "
    return f"{where}exit {deploying.returncode}: {last}; {refused} starts refused meanwhile"


def one_four_one(stage: Stage) -> str:
    """The load grows until four replicas run, and falls until one does; two rounds."""
    app = stage.config()
    app["args"]["replica"] |= SCALE
    scale = autoscaling(ReplicaConfig(**app["args"]["replica"])) | QUICK
    app["deployments"] = [{"name": "LLMServer", "autoscaling_config": scale}]
    stage.service.put_app(app)
    stage.service.wait("RUNNING", timeout_s=LIMIT_S)
    rounds: list[str] = []
    stage.strike(lambda: rounds.append(_round(stage)))
    stage.recovered(lambda: rounds.append(_round(stage)) or True)
    return "; ".join(rounds)


def _round(stage: Stage) -> str:
    peak = Load(stage.service.url, "chaos", per_s=PEAK_PER_S, tokens=PEAK_TOKENS)
    with peak:
        grown_s = _took(stage, lambda: _running(stage) == 4, GROWS_S)
    shrunk_s = _took(stage, lambda: _running(stage) == 1, SHRINKS_S)
    good = sum(answer.kind == OK for answer in peak.answers)
    bad = failures(peak.answers)
    return (
        f"four after {grown_s}, one again {shrunk_s} after that, peak {good} ok, failed {bad or 0}"
    )


def _took(stage: Stage, holds: Callable[[], bool], limit_s: float) -> str:
    began = time.monotonic()
    return f"{time.monotonic() - began:.0f} s" if stage.wait_until(holds, limit_s) else "never"


def _running(stage: Stage) -> int:
    return sum(replica.state == "RUNNING" for replica in stage.replicas())
