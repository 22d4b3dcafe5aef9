"""What a fault needs, and the logical nodes that have it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.integration.conftest import ROOT, LogicalNode
from tests.integration.service import SERVING

AHEAD_S = 7200
CLOCK = """\
import os, time
_true = time.time
time.time = lambda: _true() + os.stat({clock!r}).st_size
"""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a fault needs.

    Args:
        nodes: names; each has a token, a cache and room for `room` replicas.
        replicas: of the LLM server.
        room: replicas that fit on a node.
        access: more of the config's `access:`.
        model: more of the config's `model:`.
        logging: of the config.
        shape: of the model, see `make_model`.
        token_files: the nodes have their token in a file and not in the environment.
        disk_mib: the nodes' caches are on disks of this size; needs root.
        sessions_mib: Ray's logs and sockets are on a disk of this size; needs root.
        clock: the first node has a clock that can be set; see `with_clock`.
        gpus: of a node, shared by its replicas in Ray's books; they compute on the CPU.
        native: the compiled forward.
        engine: more of the config's `engine:`.
        env: of Ray and Serve, on all nodes.
        per_s: streams that begin each second.
        tokens: length of a stream.
    """

    nodes: tuple[str, ...] = ("a", "b", "c")
    replicas: int = 2
    room: int = 1
    access: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    logging: dict[str, Any] = field(default_factory=dict)
    shape: dict[str, int] = field(default_factory=dict)
    token_files: bool = False
    disk_mib: int | None = None
    sessions_mib: int | None = None
    clock: bool = False
    gpus: int = 0
    native: bool = False
    engine: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    per_s: float = 4.0
    tokens: int = 200


def make_node(name: str, home: Path, token: str, setup: Setup) -> LogicalNode:
    """Return a node that shares nothing with the others."""
    env = {"HF_HOME": str(home)}
    if not setup.token_files:
        return LogicalNode(name, token, SERVING, num_gpus=setup.gpus, env=env)
    (home / "secret").write_text(token)
    return LogicalNode(name, None, SERVING, num_gpus=setup.gpus, env=env | {"HOME": str(home)})


def with_clock(node: LogicalNode, home: Path) -> LogicalNode:
    """Put the clock that the node's Python sees ahead by as many seconds as `clock` has bytes."""
    (home / "clock").write_bytes(bytes(AHEAD_S))
    (home / "site").mkdir()
    (home / "site" / "sitecustomize.py").write_text(CLOCK.format(clock=str(home / "clock")))
    return replace(node, env={**node.env, "PYTHONPATH": f"{home / 'site'}{os.pathsep}{ROOT}"})


@contextmanager
def small_disk(place: Path, mib: int) -> Iterator[None]:
    """Mount a disk of this size at a place that does not exist yet."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)
        place.rmdir()
