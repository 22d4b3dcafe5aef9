"""What starts cost: the Hub's bytes and requests by nodes, and a second replica's seconds."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from scripts.local_hub.model import build_demo_model, default_cache_dir
from serve_app.telemetry.cold_start import Start, recent
from tests.chaos.nodes import Setup
from tests.chaos.stage import Stage, stage_for

ROOM = 4
MIDDLE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4}
ROUNDS = 3
IMPORTS = "import serve_app.deployments.server, serve_app.engine.engine"


def hub_bytes(nodes: int) -> dict[str, Any]:
    """Start four replicas on each of some nodes, and count what the Hub saw.

    A replica holds a quarter of its node's GPU in Ray's books and computes on the CPU.
    """
    replicas = ROOM * nodes
    setup = Setup(tuple("abcd"[:nodes]), replicas=replicas, room=ROOM, gpus=1, shape=MIDDLE)
    with stage_for(setup) as stage:
        seconds = stage.deploy()
        starts = _starts(stage, replicas)
    log = stage.hub.log
    content = [entry for entry in log if entry.origin != "hub"]
    return {
        "nodes": nodes,
        "replicas": replicas,
        "weights_bytes": stage.repo.files(stage.repo.sha)["model.safetensors"].size,
        "sent_weights_bytes": sum(entry.bytes_sent for entry in content),
        "peer_bytes": sum(start.weights_bytes["peer"] for start in starts),
        "hub_requests": len(log) - len(content),
        "content_requests": len(content),
        "deploy_s": round(seconds, 1),
        "median_replica_ready_s": round(statistics.median(start.ready_s for start in starts), 1),
    }


def second_replica() -> dict[str, Any]:
    """Start a second replica of the demo model on a node that has one, against the least work.

    The least is what any start has to do: import the engine and read the weights once. It is
    timed in a fresh process between the starts, so that both see the same machine.
    """
    model = build_demo_model(default_cache_dir())
    setup = Setup(("a",), replicas=1, room=2, native=True)
    rounds = []
    with stage_for(setup, model) as stage:
        stage.deploy()
        _starts(stage, 1)
        for number in range(ROUNDS):
            stage.scale(2)
            start = _starts(stage, 2 + number)[-1]
            stage.scale(1)
            rounds.append({"start": start.facts(), "least": _least(model)})
    ratios = [each["start"]["ready_s"] / sum(each["least"].values()) for each in rounds]
    return {
        "rounds": rounds,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "median_ratio": round(statistics.median(ratios), 2),
    }


def _starts(stage: Stage, count: int) -> list[Start]:
    """Wait for the ledgers of so many starts; they come a moment after the replicas run."""
    if not stage.wait_until(lambda: len(recent()) >= count):
        raise RuntimeError(f"{len(recent())} of {count} starts were reported")
    return recent()


def _least(model: Path) -> dict[str, float]:
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, timeout=120)
    imports_s = time.monotonic() - began
    with (model / "model.safetensors").open("rb", buffering=0) as file:
        while file.read(8 << 20):
            pass
    return {
        "imports_s": round(imports_s, 3),
        "read_s": round(time.monotonic() - began - imports_s, 3),
    }
