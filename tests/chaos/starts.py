"""What starts cost the Hub: its bytes and requests by nodes."""

from __future__ import annotations

import statistics
from typing import Any

from serve_app.telemetry.cold_start import Start, recent
from tests.chaos.nodes import Setup
from tests.chaos.stage import Stage, stage_for

ROOM = 4
MIDDLE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 4}


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


def _starts(stage: Stage, count: int) -> list[Start]:
    """Wait for the ledgers of so many starts; they come a moment after the replicas run."""
    if not stage.wait_until(lambda: len(recent()) >= count):
        raise RuntimeError(f"{len(recent())} of {count} starts were reported")
    return recent()
