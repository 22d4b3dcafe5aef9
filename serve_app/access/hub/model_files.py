"""Which files of a listing are the model, by the one rule, and which of them are here."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serve_app.access.hub.listing import (
    Entries,
    HubFile,
    cache,
    described,
    read_listing,
    repo_folder,
)
from serve_app.checkpoint import files as rule
from serve_app.errors import ModelLoadError


class NotHere(Exception):
    """A file is not here whose content decides which others are needed."""


def choose(entries: Entries, content: Callable[[HubFile], bytes | None]) -> tuple[HubFile, ...]:
    """Choose the model's files of a listing.

    Args:
        entries: checked.
        content: returns a small file, with the listed bytes; None if it is not to be had.

    Raises:
        NotHere: it is not to be had.
        ModelLoadError: the listing is none of a model.
    """
    found = {path: described(path, entry) for path, entry in entries.items()}

    def read(path: str) -> bytes:
        raw = content(found[path])
        if raw is None:
            raise NotHere(path)
        return raw

    config = rule.parse_json(read(rule.CONFIG)) if rule.CONFIG in found else None
    entry = rule.weights_entry(found.keys(), config if isinstance(config, dict) else None)
    index = None
    if entry in found and rule.is_index(str(entry)):
        index = rule.parse_index(read(str(entry)), name=str(entry))
    sizes = {path: file.size for path, file in found.items()}
    return tuple(found[path] for path in rule.model_files(sizes, entry, index))


def listed(repo_id: str, commit: str) -> tuple[HubFile, ...] | None:
    """Return the model's files of a commit, by what this node's cache knows. No network.

    Returns:
        Sorted; None if the commit was never listed here, or its index is not here.

    Raises:
        ModelLoadError: what is kept there is no listing of a model.
    """
    entries = read_listing(repo_id, commit)
    if entries is None:
        return None
    snapshot = repo_folder(repo_id) / "snapshots" / commit
    try:
        return choose(entries, lambda file: on_disk(snapshot, file))
    except NotHere:
        return None


def cached_snapshot(repo_id: str, commit: str) -> Path:
    """Return this node's copy of a commit, without any request.

    Raises:
        ModelLoadError: there is none, or files are missing from it.
    """
    directory = repo_folder(repo_id) / "snapshots" / commit
    files = listed(repo_id, commit) or ()
    if not directory.is_dir() or not all((directory / file.path).is_file() for file in files):
        raise ModelLoadError(f"{cache()} has no complete copy of {repo_id} at {commit}")
    return directory


def on_disk(snapshot: Path, file: HubFile) -> bytes | None:
    """Return a small file of a snapshot if it has the listed bytes; None if not."""
    try:
        raw = rule.read_limited(snapshot / file.path, rule.size_limit(file.path) or 0)
    except (OSError, ModelLoadError):
        return None
    return raw if content_hash(raw, file.etag) == file.etag else None


def content_hash(content: bytes, etag: str) -> str:
    """Return what names a content in the cache, of the kind that an etag is."""
    digest = content_hasher(len(content), is_large=len(etag) == 64)
    digest.update(content)
    return str(digest.hexdigest())


def content_hasher(size: int, *, is_large: bool) -> Any:
    """Return a hash to feed a file to: SHA-256 of large files, Git's blob id of the others.

    Args:
        size: of the file, which a blob id begins with.
        is_large: it lies in large-file storage.
    """
    if is_large:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
