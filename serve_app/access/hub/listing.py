"""What a Hub says a commit consists of: asked with limits, checked, and kept where all tools look.

Names, sizes and hashes of a listing become paths, allocations and file names later, so each is
checked here, whether it comes from the network or from a cache that others write to as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from huggingface_hub import constants

# Private in huggingface_hub 2.4: the listing of a commit where all its tools look for it.
from huggingface_hub._tree_cache import TREE_CACHE_FORMAT_VERSION, TreeCacheEntry
from huggingface_hub.file_download import repo_folder_name

from serve_app.access.hub.chunk_store import downloads_by_xet
from serve_app.access.hub.classify import Answer, Step, has_no_route
from serve_app.access.hub.client import Wire
from serve_app.access.hub.folders import Folder
from serve_app.checkpoint.files import parse_json, read_limited
from serve_app.checkpoint.names import escape_fault, shown
from serve_app.errors import ModelLoadError

PAGES = 100  # of 1,000 entries each on the Hub
PAGE_BYTES = 16 << 20
ENTRIES = 100_000
MAX_FILE_BYTES = 1 << 44  # 16 TiB
CACHED_BYTES = 64 << 20
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MASK = re.compile(r"\*+")

Entries = Mapping[str, TreeCacheEntry]


class Refusal(Exception):
    """The Hub answered the question for a page of the listing with something else."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(str(answer.status))
        self.answer = answer


class Masked(Exception):
    """The Hub hides the hashes of large files from who has no access; names one."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a commit, as the Hub describes it.

    Args:
        path: its place in the repository, with `/`.
        size: bytes.
        etag: its name in the cache: the SHA-256 of a large file, the Git object id of others.
        xet_hash: its name in the chunk store, if huggingface_hub would fetch it from there.
    """

    path: str
    size: int
    etag: str
    xet_hash: str | None = None


def cache() -> Path:
    """Return huggingface_hub's cache of this process."""
    return Path(constants.HF_HUB_CACHE)


def folder_name(repo_id: str) -> str:
    """Return the name of a model's folder in the cache."""
    return repo_folder_name(repo_id=repo_id, repo_type="model")


def repo_folder(repo_id: str) -> Path:
    """Return where the cache keeps a model."""
    return cache() / folder_name(repo_id)


def ask_listing(wire: Wire, endpoint: str, repo_id: str, commit: str) -> dict[str, TreeCacheEntry]:
    """Ask the Hub for all files of a commit.

    Args:
        wire: asks, within its budget.
        endpoint: the Hub; every page is asked for there.
        repo_id: the repository.
        commit: 40 hex digits.

    Raises:
        Failed: no answer came in time.
        Refusal: another answer came.
        Masked: who asks has no access to the weights.
        ModelLoadError: it is no listing that a repository can have.
    """
    place = f"{endpoint}/api/models/{repo_id}/tree/{commit}"
    query = {"recursive": "true", "expand": "false"}
    entries: dict[str, TreeCacheEntry] = {}
    for _ in range(PAGES):
        url = f"{place}?{urlencode(query)}"
        answer = wire.ask(Step.LISTING, "GET", url, limit=PAGE_BYTES + 1)
        if not entries and has_no_route(answer):
            return _described_files(wire, endpoint, repo_id, commit)
        for item in _page(answer):
            _take(entries, item)
        if len(entries) > ENTRIES:
            raise ModelLoadError(f"the list of files has more than {ENTRIES:,} entries")
        cursor = _cursor(answer)
        if cursor is None:
            return entries
        if cursor == query.get("cursor"):
            raise ModelLoadError("the list of files goes on with the page that it ended with")
        query["cursor"] = cursor
    raise ModelLoadError(f"the list of files does not end within {PAGES} pages")


def read_listing(repo_id: str, commit: str) -> Entries | None:
    """Return what the cache knows of a commit's files.

    Returns:
        A checked listing; None if there is none that a repository can have.
    """
    try:
        place = repo_folder(repo_id) / "trees" / f"{commit}.json"
        kept = parse_json(read_limited(place, CACHED_BYTES))
        if kept["format_version"] != TREE_CACHE_FORMAT_VERSION:
            return None
        entries = {path: TreeCacheEntry.from_json(info) for path, info in kept["files"].items()}
        for path, entry in entries.items():
            _check(path, entry)
    except (OSError, KeyError, TypeError, AttributeError, ModelLoadError, Masked):
        return None  # never listed here, or written by somebody else
    return entries


def keep_listing(repo_id: str, commit: str, entries: Entries) -> None:
    """Keep a listing where huggingface_hub's tools look for it; raises OSError."""
    content = {
        "format_version": TREE_CACHE_FORMAT_VERSION,
        "files": {path: entries[path].to_json() for path in sorted(entries)},
    }
    with Folder.at(cache(), folder_name(repo_id), "trees", create=True) as trees:
        trees.write(f"{commit}.json", json.dumps(content, indent=1))


def described(path: str, entry: TreeCacheEntry) -> HubFile:
    """Return one file of a checked listing."""
    size = entry.size if entry.lfs_size is None else entry.lfs_size
    return HubFile(path, size, _etag(entry), entry.xet_hash if downloads_by_xet() else None)


def _page(answer: Answer) -> list[Any]:
    if len(answer.body) > PAGE_BYTES:
        raise ModelLoadError(f"a page of the list of files has more than {PAGE_BYTES:,} bytes")
    page = answer.payload() if answer.is_ok else None
    if not isinstance(page, list):
        raise Refusal(answer)
    return page


def _described_files(
    wire: Wire, endpoint: str, repo_id: str, commit: str
) -> dict[str, TreeCacheEntry]:
    """Ask a mirror without lists of files for the description of the commit, with the hashes."""
    url = f"{endpoint}/api/models/{repo_id}/revision/{commit}?blobs=true"
    answer = wire.ask(Step.LISTING, "GET", url, limit=PAGE_BYTES)
    payload = answer.payload() if answer.is_ok else None
    if not isinstance(payload, dict) and not has_no_route(answer):
        raise Refusal(answer)
    files = payload.get("siblings") if isinstance(payload, dict) else None
    stated = [each for each in files or [] if isinstance(each, dict) and "blobId" in each]
    if not (files and len(stated) == len(files) and payload and payload.get("sha") == commit):
        raise ModelLoadError(
            "no list of files with their hashes is to be had (neither by tree/ nor by blobs=true), "
            "so nothing that is sent could be verified"
        )
    entries: dict[str, TreeCacheEntry] = {}
    for each in stated:
        item: dict[str, Any] = {
            "type": "file",
            "path": each.get("rfilename"),
            "oid": each["blobId"],
        }
        large = each.get("lfs")
        if isinstance(large, dict):
            item |= {"lfs": {"oid": large.get("sha256"), "size": large.get("size")}}
        _take(entries, {**item, "size": each.get("size", -1)})
    return entries


def _take(entries: dict[str, TreeCacheEntry], item: Any) -> None:
    """Add one entry of a page, if it is a file."""
    if not isinstance(item, dict) or item.get("type") not in ("file", "directory"):
        raise ModelLoadError("the list of files has an entry that is neither file nor directory")
    path = item.get("path")
    if fault := escape_fault(path):
        raise ModelLoadError(f"the list of files has one whose name {fault}: {shown(path)}")
    if item["type"] == "directory":
        return
    large = item.get("lfs")
    large = large if isinstance(large, dict) else {}
    entry = TreeCacheEntry(
        size=item.get("size", -1),
        blob_id=item.get("oid", ""),
        lfs_sha256=large.get("oid"),
        lfs_size=large.get("size"),
        xet_hash=item.get("xetHash"),
    )
    if path in entries:
        raise ModelLoadError(f"the list of files names {shown(path)} twice")
    _check(str(path), entry)
    entries[str(path)] = entry


def _check(path: str, entry: TreeCacheEntry) -> None:
    """Refuse what cannot be a file of a repository.

    Raises:
        Masked: the hash is hidden.
        ModelLoadError: a name, a size or a hash is none.
    """
    if fault := escape_fault(path):
        raise ModelLoadError(f"the list of files has one whose name {fault}: {shown(path)}")
    for size in (entry.size, 0 if entry.lfs_size is None else entry.lfs_size):
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= MAX_FILE_BYTES:
            raise ModelLoadError(f"the list of files has no possible size of {shown(path)}")
    hashes = [entry.blob_id, *(each for each in (entry.lfs_sha256, entry.xet_hash) if each)]
    if any(isinstance(each, str) and _MASK.fullmatch(each) for each in hashes):
        raise Masked(path)
    if not all(isinstance(each, str) and _HASH.fullmatch(each) for each in hashes):
        raise ModelLoadError(f"the list of files has no possible hash of {shown(path)}")


def _etag(entry: TreeCacheEntry) -> str:
    return entry.lfs_sha256 or entry.blob_id


def _cursor(answer: Answer) -> str | None:
    """Return what the next page is asked by; None on the last page.

    Only that much is taken of the link to it: the page is asked for at the Hub's own place,
    wherever the link leads, because the question carries the token.

    Raises:
        ModelLoadError: the link holds nothing to ask by.
    """
    match = re.search(r'<([^>]*)>\s*;\s*rel="?next"?', answer.headers.get("link", ""))
    if match is None:
        return None
    try:
        found = parse_qs(urlsplit(match[1]).query).get("cursor", [""])[-1]
    except ValueError:
        found = ""
    if not found:
        raise ModelLoadError("the list of files goes on, but does not say where")
    return found
