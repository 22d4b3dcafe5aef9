"""What runs on the nodes of a test cluster to fetch weights there, without a model or Serve."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from huggingface_hub import constants

from serve_app.config import AccessConfig, ModelConfig
from serve_app.weights.fetch import fetch
from serve_app.weights.peers import Peers
from serve_app.weights.pieces import PIECE_BYTES

WEIGHTS = "model.safetensors"


def fetch_here(
    repo_id: str, commit: str, endpoint: str, silent_s: float, piece_bytes: int = PIECE_BYTES
) -> dict[str, Any]:
    """Fetch a commit onto the node of this task; returns the bytes by source and what came."""
    constants.DOWNLOAD_CHUNK_SIZE = 1 << 20  # small files that come slowly show their progress
    peers = Peers(repo_id, commit, silent_s=silent_s, piece_bytes=piece_bytes)
    access = AccessConfig(endpoint=endpoint)
    fetched = fetch(ModelConfig(repo_id=repo_id), access, commit, peers=peers)
    digest = hashlib.sha256((fetched.directory / WEIGHTS).read_bytes()).hexdigest()
    return {**asdict(fetched), "sha256": digest}
