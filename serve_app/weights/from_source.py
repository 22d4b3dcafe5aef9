"""Files of a source without commits (`model.url`) into this node's cache, by this node alone.

What a file's content is, is known only when it has come. So its bytes collect under a name made of
its place in the listing, where a dead process's work is gone on with; are read as that listing
names them, a replaced file's never; and are compared with whatever hash the source states. Then
they get the name of their SHA-256, as every file of the cache, and the listing is compared again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub._tree_cache import TreeCacheEntry  # as `access/hub/listing.py`

from serve_app.access.hub.client import Failed
from serve_app.access.hub.listing import HubFile, keep_listing
from serve_app.access.sources import source as sources
from serve_app.access.sources.sketch import model_items
from serve_app.access.sources.source import Item, Source
from serve_app.access.verdict import UNDETERMINED, Outcome
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import AccessDenied, ModelLoadError
from serve_app.weights.store import Store

PART_BYTES = 8 << 20
TIMEOUT_S = 60.0  # of one part
TRIES = 4  # of one part
PAUSE_S = 1.0  # before the second, and twice that before each other one
FETCHERS = 8  # files at a time
_PASSING = frozenset({Outcome.HUB_UNREACHABLE, Outcome.RATE_LIMITED, Outcome.WEIGHTS_UNREACHABLE})
_FAULTS = UNDETERMINED | {
    Outcome.WEIGHTS_UNREACHABLE,
    Outcome.WEIGHTS_MISSING,
    Outcome.DIGEST_MISMATCH,
    Outcome.REPO_NOT_FOUND,
}


class SourceDownload:
    """Fetches a pinned listing's model.

    Args:
        model: names the source.
        source: open.
        pin: what its listing has to be, 64 hex digits.

    Raises:
        Failed: it lists something else, or no model.
    """

    def __init__(self, model: ModelConfig, source: Source, pin: str) -> None:
        self._model = model
        self._source = source
        self._pin = pin
        self._items = sources.listing_of(source)
        sources.require_pin(self._items, pin)
        chosen, _ = model_items(source, self._items)
        self._chosen = {item.name: item for item in chosen}

    def files(self) -> tuple[HubFile, ...]:
        """Return the model's files under the names by which they collect."""
        return tuple(
            HubFile(item.name, item.size, self._collects_as(item)) for item in self._chosen.values()
        )

    def fetch(self, store: Store, files: Sequence[HubFile]) -> tuple[HubFile, ...]:
        """Fetch files and give them their names in the cache.

        Args:
            store: this node's cache, locked.
            files: from `files`.

        Returns:
            They, with the hash of their content.

        Raises:
            Failed: the bytes do not come, other ones do, or the listing is another one by now.
            OSError: they cannot be stored.
        """
        with ThreadPoolExecutor(FETCHERS, thread_name_prefix="weights") as pool:
            for _ in pool.map(lambda file: self._take(store, file), files):
                pass
            # Before they lose the names by which another try would go on with them.
            sources.require_pin(sources.listing_of(self._source), self._pin)
            found = tuple(pool.map(lambda file: self._named(store, file), files))
        for file, named in zip(files, found, strict=True):
            store.adopt(file, named)
        entries = {f.path: TreeCacheEntry(f.size, f.etag, f.etag, f.size) for f in found}
        keep_listing(store.repo_id, store.commit, entries)
        return found

    def _take(self, store: Store, file: HubFile) -> None:
        """Fetch the rest of a file that may be here in part."""
        with store.appending(file) as stream:
            if stream.tell() > file.size:
                stream.seek(0)
                stream.truncate()
            while (start := stream.tell()) < file.size:
                stop = min(start + PART_BYTES, file.size)
                stream.write(self._part(self._chosen[file.path], start, stop))

    def _named(self, store: Store, file: HubFile) -> HubFile:
        """Return a file that has come with the hash of its content, compared with those stated."""
        stated = self._source.stated(self._chosen[file.path])
        found = {kind: _hash(store.partial(file), kind) for kind in {"sha256", *stated}}
        for kind in stated:
            if found[kind] != stated[kind]:
                store.adopt(file, None)
                message = f"{file.path} came with other bytes than its {kind.upper()} says"
                raise Failed(Outcome.WEIGHTS_UNREACHABLE, message)
        return replace(file, etag=found["sha256"])

    def _part(self, item: Item, start: int, stop: int) -> bytes:
        for tried in range(1, TRIES):
            try:
                return self._source.read(item, start, stop)
            except Failed as failed:
                if failed.outcome not in _PASSING:
                    raise
            time.sleep(PAUSE_S * 2.0 ** (tried - 1))
        return self._source.read(item, start, stop)

    def _collects_as(self, item: Item) -> str:
        place = f"{self._model.url}\0{item.name}\0{item.size}\0{item.tag}"
        return hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()


def _hash(path: Path, kind: str) -> str:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, lambda: hashlib.new(kind, usedforsecurity=False))
    return digest.hexdigest()


@contextmanager
def downloading(model: ModelConfig, access: AccessConfig, pin: str) -> Iterator[SourceDownload]:
    """Open a source for a download; `Failed` within is raised as the package's errors.

    Raises:
        AccessDenied: it refuses.
        ModelLoadError: it does not answer, or has something else by now.
    """
    with raising(model), sources.opened(model, access, timeout_s=TIMEOUT_S) as source:
        yield SourceDownload(model, source, pin)


@contextmanager
def raising(model: ModelConfig) -> Iterator[None]:
    """Raise how a source failed as the package's errors, one sentence each."""
    try:
        yield
    except Failed as failed:
        kind = ModelLoadError if failed.outcome in _FAULTS else AccessDenied
        raise kind(f"{model.source} cannot be loaded: {failed.message}") from None
