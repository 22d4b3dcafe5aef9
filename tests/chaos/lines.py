"""How long weights take to eight nodes whose lines, and the Hub's, are of known speed.

Slow enough that the lines take the time and not the machine's cores, which all nodes share.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import ray
from huggingface_hub import constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from scripts.local_hub import LocalHub, Repo
from serve_app.config import AccessConfig, ModelConfig
from serve_app.weights import chunks, peers
from serve_app.weights.announcements import member_name
from serve_app.weights.fetch import fetch
from serve_app.weights.holdings import GIVES
from serve_app.weights.lifetime import named_actor
from tests.integration.conftest import cluster_of
from tests.integration.homes import make_homes, nodes_at_home

NODES = "abcdefgh"
FILES, SIZE = 4, 6 << 20
PIECE_BYTES, CHUNK_BYTES = 1 << 19, 1 << 18  # as many pieces as 12 GB have in 64 MiB
HUB_RATE, LINE_RATE = 1.2e6, 3.6e6  # bytes a second
ROUNDS = 3


def eight_nodes() -> dict[str, Any]:
    """Fetch a commit onto one node, and another one onto eight at once."""
    rounds = []
    with tempfile.TemporaryDirectory(prefix="chaos-lines-") as scratch, LocalHub() as hub:
        homes = make_homes(NODES, Path(scratch))
        with cluster_of(*nodes_at_home(hub, homes)):
            for number in range(ROUNDS):
                one = _fetch(hub, NODES[:1], Path(scratch) / f"{number}-one")
                all_of_them = _fetch(hub, NODES, Path(scratch) / f"{number}-all")
                rounds.append(
                    {
                        "one_s": round(one["seconds"], 2),
                        "eight_s": round(all_of_them["seconds"], 2),
                        "ratio": round(all_of_them["seconds"] / one["seconds"], 2),
                        "hub": round(all_of_them["sent"] / (FILES * SIZE), 3),
                    }
                )
    return {
        "megabytes": FILES * SIZE / 1e6,
        "files": FILES,
        "hub_mb_s": HUB_RATE / 1e6,
        "line_mb_s": LINE_RATE / 1e6,
        "rounds": rounds,
    }


def _fetch(hub: LocalHub, names: str, meeting: Path) -> dict[str, float]:
    meeting.mkdir()
    repo = _repo(f"acme/lines-{meeting.name}")
    hub.add_repo(repo)
    hub.clear_log()
    ids = {known["NodeName"]: known["NodeID"] for known in ray.nodes() if known["Alive"]}
    # A process for each: the lines of one are not to be those of the next.
    task = ray.remote(max_calls=1)(_fetch_here)
    spans = ray.get(
        [
            task.options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(ids[name], soft=False),
            ).remote(repo.repo_id, repo.sha, hub.url, str(meeting), len(names))
            for name in names
        ],
        timeout=600,
    )
    return {
        "seconds": max(end for _, end in spans) - min(begin for begin, _ in spans),
        "sent": sum(entry.bytes_sent for entry in hub.log if entry.origin == "cdn"),
    }


def _repo(repo_id: str) -> Repo:
    names = [f"model-{n + 1:05}-of-{FILES:05}.safetensors" for n in range(FILES)]
    index = {"metadata": {}, "weight_map": {f"w{n}": name for n, name in enumerate(names)}}
    files = {name: os.urandom(SIZE) for name in names}
    small = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    repo = Repo(repo_id, files | small)
    line = Line(HUB_RATE)
    for name in names:
        repo.files(repo.sha)[name].open = partial(_OverLine, files[name], line)
    return repo


class Line:
    """Lets so many bytes a second pass, for all who use it together."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._free_at = time.monotonic()
        self._lock = threading.Lock()

    def take(self, count: int) -> None:
        """Wait until so many bytes have passed."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + count / self._rate
            free_at = self._free_at
        time.sleep(max(0.0, free_at - time.monotonic()))


class _OverLine(io.BytesIO):
    def __init__(self, content: bytes, line: Line) -> None:
        super().__init__(content)
        self._line = line

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(size)
        self._line.take(len(found))
        return found


def _fetch_here(
    repo_id: str, commit: str, endpoint: str, meeting: str, count: int
) -> tuple[float, float]:
    """Fetch onto this task's node when as many tasks have met; returns when it began and ended."""
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
    known = peers.Peers(repo_id, commit, silent_s=15.0, piece_bytes=PIECE_BYTES)
    _slow_down()
    (Path(meeting) / ray.get_runtime_context().get_task_id()).touch()
    while len(list(Path(meeting).iterdir())) < count:
        time.sleep(0.02)
    began = time.monotonic()
    access = AccessConfig(endpoint=endpoint)
    fetched = fetch(ModelConfig(repo_id=repo_id), access, commit, peers=known)
    ended = time.monotonic()
    came = asdict(fetched)
    assert came["hub_bytes"] + came["peer_bytes"] > FILES * SIZE
    return began, ended


class SlowGiver(chunks.Giver):
    """A node that hands out pieces over its line."""

    def __init__(self) -> None:
        super().__init__()
        chunks.CHUNK_BYTES = CHUNK_BYTES
        self._line = Line(LINE_RATE)

    def is_slow(self) -> bool:
        """Return True: a node's own giver has no such question."""
        return True

    def read(self, repo_id: str, commit: str, etag: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield a piece in chunks, each as its bytes have passed."""
        for chunk in super().read(repo_id, commit, etag, start, stop):
            self._line.take(len(chunk))
            yield chunk


def _slow_down() -> None:
    giver = _giver()
    deadline = time.monotonic() + 30
    while not hasattr(giver, "is_slow"):  # the node's own, which a fetch before this left
        assert time.monotonic() < deadline
        ray.kill(giver)
        time.sleep(0.2)
        giver = _giver()
    ray.get(giver.is_slow.remote())
    line, read = Line(LINE_RATE), peers.Peers._read

    def received(self: peers.Peers, *of: Any) -> Iterator[bytes]:
        for chunk in read(self, *of):
            line.take(len(chunk))
            yield chunk

    peers.Peers._read = received


def _giver() -> Any:
    node = ray.get_runtime_context().get_node_id()
    return named_actor(
        SlowGiver,
        f"weights/giver/{member_name()}",
        max_concurrency=GIVES,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
