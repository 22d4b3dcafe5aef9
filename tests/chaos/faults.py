"""Faults of processes, and the list of all faults.

A function's docstring says what breaks; it returns what the numbers do not show.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.chaos import moving, supply
from tests.chaos.nodes import Setup
from tests.chaos.stage import LIMIT_S, Stage
from tests.processes import children_of


def replica_killed(stage: Stage) -> str:
    """One of two replicas gets SIGKILL while it streams."""
    victim = stage.replicas()[0]
    stage.lose(victim)
    stage.recovered(lambda: stage.are_well(victim))
    return ""


def core_killed(stage: Stage) -> str:
    """The process of vLLM that computes for one of two replicas gets SIGKILL."""
    victim = stage.replicas()[0]
    (core,) = children_of(victim.pid, "VLLM::Engine")

    def strike() -> None:
        stage.streams_lost = stage.streams_of(victim)
        _kill(core)

    stage.strike(strike)
    stage.recovered(lambda: stage.are_well(victim))
    return ""


def node_killed(stage: Stage) -> str:
    """A node with one of two replicas dies; another node has room."""
    victim = stage.replicas()[0]
    ingresses = [replica.node for replica in stage.replicas("Ingress")]

    def strike() -> None:
        stage.streams_lost = stage.streams_of(victim)
        stage.cluster.remove(victim.node)

    stage.strike(strike)
    began = time.monotonic()
    stage.wait_until(lambda: victim.node not in stage.living_nodes())
    noticed_s = time.monotonic() - began
    stage.recovered(lambda: stage.are_well(victim))
    there = f"{ingresses.count(victim.node)} of {len(ingresses)} ingresses were there"
    return f"{there}; Ray noticed after {noticed_s:.0f} s, until then what was sent there waits"


def raylet_killed(stage: Stage) -> str:
    """Ray's own process on a node with one of two replicas gets SIGKILL; another node has room."""
    victim = stage.replicas()[0]

    def strike() -> None:
        stage.streams_lost = stage.streams_of(victim)
        stage.cluster.kill_raylet(victim.node)

    stage.strike(strike)
    began = time.monotonic()
    gone = stage.wait_until(lambda: not _lives(victim.pid), limit_s=LIMIT_S)
    ended = f"ends {time.monotonic() - began:.0f} s after it" if gone else "lives on without it"
    stage.recovered(lambda: stage.are_well(victim))
    return f"its replica's process {ended}"


def ingress_killed(stage: Stage) -> str:
    """One ingress replica gets SIGKILL."""
    ingresses = stage.replicas("Ingress")
    victim = ingresses[0]

    def is_well() -> bool:
        now = stage.replicas("Ingress")
        running = {replica.actor for replica in now if replica.state == "RUNNING"}
        return len(running) == len(ingresses) and victim.actor not in running

    stage.strike(lambda: _kill(victim.pid))
    stage.recovered(is_well)
    return f"one of {len(ingresses)}"


def controller_killed(stage: Stage) -> str:
    """Serve's controller gets SIGKILL."""
    pid = stage.pid_of("CONTROLLER")
    before = {replica.actor for replica in stage.replicas()}
    stage.strike(lambda: _kill(pid))
    stage.recovered(lambda: stage.pid_of("CONTROLLER") != pid and stage.are_well())
    same = before == {replica.actor for replica in stage.replicas()}
    return "the same replicas serve on" if same else "replicas were restarted"


def proxy_killed(stage: Stage) -> str:
    """The only proxy gets SIGKILL."""
    pid = stage.pid_of("PROXY")
    stage.strike(lambda: _kill(pid))
    stage.recovered(lambda: stage.pid_of("PROXY") != pid)
    return "one proxy; a load balancer over one on each node has others"


def two_deploys(stage: Stage) -> str:
    """Two people deploy two configs at the same moment."""
    http = {"host": "127.0.0.1", "port": stage.service.port}
    command = [sys.executable, "-m", "serve_app", "deploy", "--timeout", "2m"]
    running: list[subprocess.Popen[str]] = []

    def strike() -> None:
        for number in (101, 102):
            path = stage.homes["a"] / f"{number}.yaml"
            app = stage.config(api={"max_queued_requests": number})
            path.write_text(yaml.safe_dump({"http_options": http, "applications": [app]}))
            arguments = [str(path), "--address", stage.cluster.address]
            pipe = subprocess.PIPE
            running.append(
                subprocess.Popen([*command, *arguments], stdout=pipe, stderr=pipe, text=True)
            )

    stage.strike(strike)
    ends = []
    for deploying in running:
        out, err = deploying.communicate(timeout=LIMIT_S)
        line = (err if deploying.returncode else out).strip().splitlines()[-1]
        ends.append(f"exit {deploying.returncode}: {line}")
    stage.recovered(stage.are_well)
    served = stage.reported_by_serve()["deployed_app_config"]["args"]["api"]["max_queued_requests"]
    return f"{' / '.join(ends)}; served: the {'second' if served == 102 else 'first'}"


def _lives(pid: int) -> bool:
    """Return whether a process runs; one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


Fault = Callable[[Stage], str]
PAIR = ("a", "b")  # no third node, so that the successor starts where the fault is
LARGER = {"hidden_size": 256, "num_hidden_layers": 4}
WIDE = {"hidden_size": 128, "head_dim": 32}  # as vLLM's kernels for CPUs want heads
VLLM: dict[str, Any] = {"backend": "vllm", "vllm": {"enforce_eager": True}}
FAULTS: dict[str, tuple[Fault, Setup]] = {
    "replica killed": (replica_killed, Setup(PAIR)),
    "replica killed, vllm": (replica_killed, Setup(PAIR, engine=VLLM, shape=WIDE, per_s=1.0)),
    "core killed, vllm": (core_killed, Setup(PAIR, engine=VLLM, shape=WIDE, per_s=1.0)),
    "node killed": (node_killed, Setup()),
    "raylet killed": (raylet_killed, Setup()),
    "ingress killed": (ingress_killed, Setup(PAIR)),
    "controller killed": (controller_killed, Setup(PAIR)),
    "proxy killed": (proxy_killed, Setup(PAIR)),
    "proxy killed, asked each second": (
        proxy_killed,
        Setup(PAIR, env={"RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1"}),  # Kubernetes' base
    ),
    "Hub down": (supply.hub_down, Setup(PAIR)),
    "Hub down, receipts": (
        supply.hub_down_receipts,
        Setup(PAIR, access={"on_unreachable": "allow_cached"}),
    ),
    "Hub slow": (
        supply.hub_slow,
        Setup(PAIR, access={"timeout_s": 5}, model={"share_weights": False}, shape=LARGER),
    ),
    "disk full": (supply.disk_full, Setup(PAIR, disk_mib=16, shape=LARGER)),
    "disk full while serving": (
        supply.disk_full_while_serving,
        Setup(PAIR, disk_mib=16, access={"watch_interval_s": 2}),
    ),
    "log disk full while serving": (
        supply.log_disk_full,
        Setup(PAIR, sessions_mib=256, logging={"level": "debug"}),
    ),
    "cache corrupted": (supply.cache_corrupted, Setup(PAIR)),
    "token rotated": (
        supply.token_rotated,
        Setup(PAIR, token_files=True, access={"token_file": "~/secret"}),
    ),
    "token rotated in a rollout": (
        moving.token_rotated_in_a_rollout,
        Setup(PAIR, room=2, token_files=True, access={"token_file": "~/secret"}),
    ),
    "Hub failing while growing": (
        moving.hub_fails_while_growing,
        Setup(PAIR, replicas=1, access={"timeout_s": 2}),
    ),
    "1 to 4 to 1": (
        moving.one_four_one,
        Setup(tuple("abcd"), replicas=1, native=True, per_s=1.0, tokens=50),
    ),
    "two deploys": (two_deploys, Setup(PAIR, room=2)),
    "clock set back while serving": (
        supply.clock_set_back,
        Setup(PAIR, clock=True, access={"watch_interval_s": 2}),
    ),
    "clock skew": (
        supply.clock_skew,
        Setup(PAIR, clock=True, access={"on_unreachable": "allow_cached"}),
    ),
}
