"""Faults of what a replica needs to start: the Hub, the disk, the cache, the token, the clock.

What serves must not notice any of them. So each strikes together with the loss of a replica,
whose successor meets it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.local_hub import Behaviour
from tests.chaos.stage import REPO, Replica, Stage
from tests.weights.conftest import serve_other_bytes

WEIGHTS = "model.safetensors"
HELD_S = 20.0  # how long a fault lasts that a person repairs


def hub_down(stage: Stage) -> str:
    """The Hub is gone, and so is a replica; `on_unreachable: block`. The Hub comes back."""
    victim = stage.replicas()[0]
    stage.lose(victim, stage.hub.stop)
    return _repair(stage, victim, stage.hub.start)


def hub_down_receipts(stage: Stage) -> str:
    """The Hub is gone, and so is a replica; `on_unreachable: allow_cached`. The Hub stays away."""
    victim = stage.replicas()[0]
    stage.lose(victim, stage.hub.stop)
    stage.recovered(lambda: stage.are_well(victim))
    return "the receipts of the nodes stand in"


def hub_slow(stage: Stage) -> str:
    """A replica's node lost its copy, and the Hub sends 1 MiB in 2 s; nodes do not share."""
    victim = stage.replicas()[0]
    file = stage.repo.files(stage.repo.sha)[WEIGHTS]
    content = file.open().read()
    blob = _blob(stage, victim)

    def strike() -> None:
        blob.unlink()
        serve_other_bytes(file, content, pause_s=2.0)

    stage.lose(victim, strike)
    stage.recovered(lambda: stage.are_well(victim))
    return f"{len(content) / 2**20:.0f} MiB to fetch"


def disk_full(stage: Stage) -> str:
    """A replica's node lost its copy and has no room for another; a person makes room."""
    victim = stage.replicas()[0]
    blob = _blob(stage, victim)
    rest = blob.parent / "rest"

    stage.lose(victim, blob.unlink)
    _fill(rest)  # now that nobody holds what was removed
    return _repair(stage, victim, rest.unlink)


def disk_full_while_serving(stage: Stage) -> str:
    """The disks of all caches, where the receipts are too, are full for 20 s."""
    rests = [home / "hub" / "rest" for home in stage.homes.values()]
    stage.strike(lambda: [_fill(rest) for rest in rests])
    before = _rounds(stage)
    time.sleep(HELD_S)
    during = _rounds(stage) - before
    outcomes = {node["outcome"] for node in _access(stage)["nodes"]}
    for rest in rests:
        rest.unlink()
    stage.recovered(stage.are_well)
    return f"{during} rounds of the watch meanwhile; outcomes: {', '.join(sorted(outcomes))}"


def log_disk_full(stage: Stage) -> str:
    """The disk of Ray's sessions, with all logs and sockets, is full for 20 s; level debug."""
    rest = stage.service.logs.parent / "rest"
    before = {replica.actor for replica in stage.replicas()}
    stage.strike(lambda: _fill(rest))
    time.sleep(HELD_S)
    lines = len(stage.service.logged("request.finished", "Ingress"))
    rest.unlink()
    stage.recovered(stage.are_well)
    same = before == {replica.actor for replica in stage.replicas()}
    more = len(stage.service.logged("request.finished", "Ingress")) - lines
    goes_on = f"{more} lines in the 4 s after it" if more else "the log does not go on"
    return f"{'the same replicas' if same else 'replicas were restarted'}; {goes_on}"


def clock_set_back(stage: Stage) -> str:
    """The clock of a node that is 2 h ahead is set right while it serves."""
    before = {replica.actor for replica in stage.replicas()}
    stage.strike(lambda: os.truncate(stage.homes["a"] / "clock", 0))
    rounds = _rounds(stage)
    time.sleep(HELD_S)
    rounds = _rounds(stage) - rounds
    outcomes = {node["outcome"] for node in _access(stage)["nodes"]}
    stage.recovered(stage.are_well)
    same = before == {replica.actor for replica in stage.replicas()}
    kept = "the same replicas" if same else "replicas were restarted"
    return (
        f"{kept}; {rounds} rounds of the watch meanwhile; outcomes: {', '.join(sorted(outcomes))}"
    )


def cache_corrupted(stage: Stage) -> str:
    """A byte of a node's copy is changed, and its replica dies."""
    victim = stage.replicas()[0]
    blob = _blob(stage, victim)
    right = blob.name

    def strike() -> None:
        with blob.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))

    stage.lose(victim, strike)
    stage.recovered(lambda: stage.are_well(victim))
    found = len(stage.service.logged("weights.damaged", "LLMServer"))
    repaired = hashlib.sha256(blob.read_bytes()).hexdigest() == right
    return f"found {found} times; the copy is {'right again' if repaired else 'still wrong'}"


def token_rotated(stage: Stage) -> str:
    """The tokens of all nodes are revoked and a replica dies; new tokens come in the files."""
    victim = stage.replicas()[0]

    def strike() -> None:
        for token in stage.tokens.values():
            stage.hub.set_behaviour(token, Behaviour.invalid)

    def repair() -> None:
        for name, home in stage.homes.items():
            (home / "secret").write_text(stage.hub.issue_token(account=name))

    stage.lose(victim, strike)
    return _repair(stage, victim, repair)


def clock_skew(stage: Stage) -> str:
    """A node starts 2 h ahead; its clock is set right, the Hub and its replica go; the Hub comes.

    With `on_unreachable: allow_cached`: the receipt is from the future, and so it proves nothing.
    """
    clock = stage.homes["a"] / "clock"
    victim = next(replica for replica in stage.replicas() if replica.node == "a")

    def strike() -> None:
        os.truncate(clock, 0)
        stage.hub.stop()

    stage.lose(victim, strike)
    return _repair(stage, victim, stage.hub.start)


def _repair(stage: Stage, victim: Replica, repair: Callable[[], object]) -> str:
    """Let the fault last, end it, and say what happened before and after that."""
    early = stage.wait_until(lambda: stage.are_well(victim), limit_s=HELD_S)
    refused = {line["outcome"] for line in stage.service.logged("access.refused", "LLMServer")}
    reported = ", ".join(sorted(refused)) or stage.reported()
    repair()
    repaired = time.monotonic()
    stage.recovered(lambda: stage.are_well(victim))
    if stage.recovered_at is None:
        return "does not come back"
    before = "came back before that" if early else "rightly did not start before that"
    after_s = stage.recovered_at - repaired
    return (
        f"fixed after {HELD_S:.0f} s: {before}, runs {after_s:.0f} s after it; reported: {reported}"
    )


def _rounds(stage: Stage) -> int:
    """Count the Hub's answers so far; each round of the watch asks it for each node."""
    return len(stage.hub.log) // len(stage.homes)


def _access(stage: Stage) -> dict[str, Any]:
    with urllib.request.urlopen(f"{stage.service.url}/access", timeout=10) as answer:
        access: dict[str, Any] = json.load(answer)
    return access


def _blob(stage: Stage, victim: Replica) -> Path:
    (link,) = (stage.homes[victim.node] / "hub").glob(
        f"models--{REPO.replace('/', '--')}/snapshots/*/{WEIGHTS}"
    )
    return link.resolve()


def _fill(path: Path) -> None:
    """Write until the disk is full."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass
