"""What a node runs to hand out pieces of files: of a commit that it announced, and of nothing else.

Who asks names the commit and the hash; where the file lies, and whether it is the commit's, this
node finds out by itself. Whoever may run code in the cluster can read more, but not through us.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, BinaryIO

from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.access.hub.folders import Folder
from serve_app.access.hub.listing import HubFile, cache, described, folder_name, read_listing
from serve_app.weights.announcements import is_announced, member_name, node_of
from serve_app.weights.holdings import GIVES
from serve_app.weights.lifetime import Lifetime, named_actor
from serve_app.weights.partial import read_journal
from serve_app.weights.store import Store

CHUNK_BYTES = 8 << 20
IN_FLIGHT = 2  # chunks of one piece, which bounds the memory of both object stores
_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class NotOffered(Exception):
    """This node does not hand that out."""


def read_piece(repo_id: str, commit: str, etag: str, start: int, stop: int) -> Iterator[bytes]:
    """Read a part of a file that is here whole, or a piece of one that is not.

    Args:
        repo_id: the repository.
        commit: 40 hex digits, announced by this node.
        etag: the file's hash.
        start: the first byte.
        stop: the one behind the last.

    Raises:
        NotOffered: it is not announced here, is no file of the commit, or is not here.
        OSError: it cannot be read.
    """
    file = _offered(repo_id, commit, etag)
    is_span = type(start) is int and type(stop) is int and 0 <= start < stop <= file.size
    if not is_span:
        raise NotOffered(f"{etag} has no such part")
    with ExitStack() as stack:
        stream = stack.enter_context(_open(Store(repo_id, commit), file, (start, stop)))
        stream.seek(start)
        while start < stop and (chunk := stream.read(min(CHUNK_BYTES, stop - start))):
            start += len(chunk)
            yield chunk


def _offered(repo_id: str, commit: str, etag: str) -> HubFile:
    sane = isinstance(repo_id, str) and _REPO.fullmatch(repo_id) and isinstance(commit, str)
    if not (sane and _COMMIT.fullmatch(commit)):
        raise NotOffered("that names no commit of a repository")
    if not is_announced(repo_id, commit, member_name()):
        raise NotOffered(f"this node did not announce {repo_id} at {commit}")
    for path, entry in (read_listing(repo_id, commit) or {}).items():
        file = described(path, entry)
        if file.etag == etag:
            return file
    raise NotOffered(f"this node offers no such file of {repo_id} at {commit}")


def _open(store: Store, file: HubFile, span: tuple[int, int]) -> BinaryIO:
    place = store.place(file)
    if place is not None:
        if not place.resolve().is_relative_to(cache().resolve()):
            raise NotOffered(f"this node has {file.etag} outside its cache")
        return place.open("rb")
    try:
        with Folder.at(cache(), folder_name(store.repo_id), "blobs") as blobs:
            partial = store.partial(file).name
            if span in (read_journal(blobs, partial) or ()):
                return blobs.reading(partial)
    except FileNotFoundError:
        pass
    raise NotOffered(f"this node has no such part of {file.etag}")


class Giver:
    """Hands out pieces on one node, as an actor that ends when nobody asks any more."""

    def __init__(self) -> None:
        self._lifetime = Lifetime()

    def read(self, repo_id: str, commit: str, etag: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield a piece in chunks; see `read_piece`."""
        with self._lifetime.used():
            yield from read_piece(repo_id, commit, etag, start, stop)


def start_reading(source: str, repo_id: str, commit: str, etag: str, span: tuple[int, int]) -> Any:
    """Let a node read a piece; it goes on only as fast as we take the chunks.

    Args:
        source: the node, as `member_name` names it.
        repo_id: the repository.
        commit: 40 hex digits.
        etag: the file's hash.
        span: first byte, and the one behind the last.

    Returns:
        Ray's generator of references.
    """
    giver = named_actor(
        Giver,
        f"weights/giver/{source}",
        max_concurrency=GIVES,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node_of(source), soft=False),
    )
    return giver.read.options(
        num_returns="streaming", _generator_backpressure_num_objects=IN_FLIGHT
    ).remote(repo_id, commit, etag, *span)
