"""Files of a commit from the Hub into this node's cache, every byte verified."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import structlog

from serve_app.access.hub.download import HubDownload
from serve_app.access.hub.listing import HubFile
from serve_app.errors import ModelLoadError
from serve_app.weights.store import Damaged, Store

log = structlog.get_logger()

FETCHERS = 8  # files at a time from the Hub, as huggingface_hub does it


def fetch_from_hub(store: Store, hub: HubDownload, files: Sequence[HubFile]) -> None:
    """Fetch files: from the Hub's chunk store where it can be, else over HTTP.

    Args:
        store: this node's cache, locked.
        hub: the commit.
        files: of the commit, none of them whole here.

    Raises:
        AccessDenied: the Hub refuses.
        ModelLoadError: the bytes do not come, or other ones do.
        OSError: they cannot be stored.
    """
    chunked = [file for file in files if file.xet_hash]
    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="weights") as pool:
        _fetch_over_http(pool, store, hub, [file for file in files if not file.xet_hash])
        if chunked:
            reason = hub.fetch_by_xet([(file, store.prepare_chunked(file)) for file in chunked])
            came = pool.map(lambda file: accept_chunked(store, file, reason), chunked)
            left = [file for file, right in zip(chunked, came, strict=True) if not right]
            _fetch_over_http(pool, store, hub, left)


def fetch_chunked(store: Store, hub: HubDownload, file: HubFile) -> bool:
    """Fetch one file from the chunk store; False if it did not come right."""
    return accept_chunked(store, file, hub.fetch_by_xet([(file, store.prepare_chunked(file))]))


def accept_chunked(store: Store, file: HubFile, reason: str | None) -> bool:
    """Take what came from the chunk store if its bytes are right.

    Args:
        store: this node's cache.
        file: the file.
        reason: what its client complained of, for the log.
    """
    try:
        store.accept_chunked(file)
    except Damaged:
        reason = reason or "other bytes came than are listed"
        log.warning("weights.xet_failed", repo_id=store.repo_id, file=file.path, reason=reason)
        return False
    return True


def came_wrong(store: Store, file: HubFile) -> ModelLoadError:
    """Return the error for a file that has the Hub's bytes and not its hash."""
    message = f"{file.path} of {store.repo_id} came twice with other bytes than listed"
    return ModelLoadError(message)


def _fetch_over_http(
    pool: ThreadPoolExecutor, store: Store, hub: HubDownload, files: Sequence[HubFile]
) -> None:
    for _ in pool.map(lambda file: _fetch_file(store, hub, file), files):
        pass


def _fetch_file(store: Store, hub: HubDownload, file: HubFile) -> None:
    """Fetch one file; what a dead process left may be wrong, so once more from its first byte."""
    for _ in range(2):
        hub.fetch(file, lambda: store.appending(file))
        try:
            store.accept(file)
        except Damaged:
            continue
        return
    raise came_wrong(store, file)
