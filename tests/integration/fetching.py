"""What runs on the nodes of a test cluster to fetch weights there, without a model or Serve."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from huggingface_hub import constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.config import AccessConfig, ModelConfig
from serve_app.weights import chunks, peers
from serve_app.weights.announcements import member_name
from serve_app.weights.fetch import fetch
from serve_app.weights.holdings import GIVES
from serve_app.weights.lifetime import named_actor
from serve_app.weights.peers import Peers
from serve_app.weights.pieces import PIECE_BYTES

WEIGHTS = "model.safetensors"


def fetch_here(
    repo_id: str,
    commit: str,
    endpoint: str,
    silent_s: float,
    *,
    piece_bytes: int = PIECE_BYTES,
    line: float | None = None,
    together: tuple[str, int] | None = None,
) -> dict[str, Any]:
    """Fetch a commit onto the node of this task.

    Args:
        repo_id: the repository.
        commit: 40 hex digits.
        endpoint: the Hub.
        silent_s: see `Peers`.
        piece_bytes: see `Peers`.
        line: bytes a second of the node, each way.
        together: a folder, and how many tasks meet there before they begin.

    Returns:
        The bytes by source, what came, and between which seconds of the machine's clock.
    """
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # small files that come slowly show their progress
    known = Peers(repo_id, commit, silent_s=silent_s, piece_bytes=piece_bytes)
    if line is not None:
        _slow_down(line)
    if together is not None:
        _meet(*together)
    access = AccessConfig(endpoint=endpoint)
    began = time.monotonic()
    fetched = fetch(ModelConfig(repo_id=repo_id), access, commit, peers=known)
    span = (began, time.monotonic())
    digest = hashlib.sha256()
    for path in sorted(fetched.directory.glob("*.safetensors")):
        digest.update(path.read_bytes())
    return {**asdict(fetched), "sha256": digest.hexdigest(), "span": span}


def _meet(folder: str, count: int) -> None:
    place = Path(folder)
    (place / ray.get_runtime_context().get_task_id()).touch()
    while len(list(place.iterdir())) < count:
        time.sleep(0.02)


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


class SlowGiver(chunks.Giver):
    """A node that hands out pieces over its line."""

    def __init__(self) -> None:
        super().__init__()
        self._line: Line | None = None

    def open_line(self, rate: float) -> None:
        """Set how fast it is."""
        chunks.CHUNK_BYTES = 1 << 18
        self._line = Line(rate)

    def read(self, repo_id: str, commit: str, etag: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield a piece in chunks, each as its bytes have passed."""
        for chunk in super().read(repo_id, commit, etag, start, stop):
            if self._line is not None:
                self._line.take(len(chunk))
            yield chunk


def _slow_down(rate: float) -> None:
    giver = _giver()
    if not hasattr(giver, "open_line"):  # a fast one is here
        ray.kill(giver)
        deadline = time.monotonic() + 30
        while not hasattr(giver := _giver(), "open_line"):
            assert time.monotonic() < deadline
            time.sleep(0.2)
    ray.get(giver.open_line.remote(rate))
    line, read = Line(rate), peers.Peers._read

    def received(self: Peers, *of: Any) -> Iterator[bytes]:
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
