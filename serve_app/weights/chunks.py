"""What a node runs to hand out its files: of a commit that it announced, and of nothing else.

Who asks names the commit and the hashes; where they lie, and whether they are the commit's, this
node finds out by itself. Whoever may run code in the cluster can read more, but not through us.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray

from serve_app.access.hub.listing import HubFile, cache
from serve_app.access.hub.model_files import listed
from serve_app.weights.announcements import is_announced
from serve_app.weights.store import Store

CHUNK_BYTES = 8 << 20
_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class NotOffered(Exception):
    """This node does not hand that out."""


def read_chunks(repo_id: str, commit: str, wanted: Sequence[tuple[str, int]]) -> Iterator[bytes]:
    """Read files from an offset to their end, one after the other; no chunk holds two files.

    Args:
        repo_id: the repository.
        commit: 40 hex digits, announced by this node.
        wanted: hash and first byte of each file.

    Raises:
        NotOffered: it is not announced here, or is no file of the commit.
        OSError: a file is not here any more.
    """
    offered = _offered(repo_id, commit)
    store = Store(repo_id, commit)
    for name, start in wanted:
        if name not in offered or not isinstance(start, int) or start < 0:
            raise NotOffered(f"this node offers no such file of {repo_id} at {commit}")
        yield from _read(_place(store, offered[name]), start)


def _offered(repo_id: str, commit: str) -> dict[str, HubFile]:
    """Return the commit's files by their hashes."""
    sane = isinstance(repo_id, str) and _REPO.fullmatch(repo_id) and isinstance(commit, str)
    if not (sane and _COMMIT.fullmatch(commit)):
        raise NotOffered("that names no commit of a repository")
    node_id: str = ray.get_runtime_context().get_node_id()
    if not is_announced(repo_id, commit, node_id):
        raise NotOffered(f"this node did not announce {repo_id} at {commit}")
    return {file.etag: file for file in listed(repo_id, commit) or ()}


def _place(store: Store, file: HubFile) -> Path:
    place = store.place(file)
    root = cache().resolve()
    if place is None or not place.resolve().is_relative_to(root):
        raise NotOffered(f"this node has {file.etag} no more, or outside its cache")
    return place


def _read(path: Path, start: int) -> Iterator[bytes]:
    with path.open("rb") as stream:
        stream.seek(start)
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
