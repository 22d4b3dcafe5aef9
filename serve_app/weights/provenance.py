"""What is about to be loaded, compared with `model.digest` and `access.signature`: of these bytes.

The gate compared the Hub's listing, or read the directory. Here the listing that the copy was
verified by must have the same digest and signature, each file its listed hash, and nothing may lie
in the copy that the listing does not name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from serve_app.access.digest import (
    digest_fault,
    digest_of,
    directory_hashes,
    listed_hashes,
)
from serve_app.access.hub.download import HubDownload
from serve_app.access.hub.listing import Entries, read_listing
from serve_app.access.hub.model_files import NotHere, choose, content_hash, on_disk
from serve_app.access.signature import Unverified, require_signed
from serve_app.access.sources.source import content_hashes, listing_of, opened, require_pin
from serve_app.access.terms import Terms
from serve_app.checkpoint.files import is_read
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import ModelLoadError
from serve_app.weights.from_source import TIMEOUT_S, raising
from serve_app.weights.store import Store


def require_directory(model: ModelConfig, access: AccessConfig) -> None:
    """Compare a local directory with what the config wants of its files.

    Raises:
        ModelLoadError: it is another one, or signed by nobody who is wanted.
    """
    terms = Terms.of(model, access)
    if terms.wants_files:
        directory = Path(str(model.path)).expanduser()
        hashes = directory_hashes(directory)
        _refuse(model, terms, directory, hashes, _other_digest(terms, hashes), whole=True)


def require_copy(store: Store, model: ModelConfig, access: AccessConfig, *, offline: bool) -> None:
    """Compare the copy of a commit with what the config wants of its files.

    Args:
        store: the commit in this node's cache.
        model: what is wanted.
        access: which token, which Hub; asked only where the cache kept no listing.
        offline: do not ask.

    Raises:
        AccessDenied: the Hub refuses.
        ModelLoadError: the copy is another one, or nobody can say.
    """
    terms = Terms.of(model, access)
    if not terms.wants_files:
        return
    entries = read_listing(store.repo_id, store.commit)
    if entries is None and not offline:
        entries = HubDownload(store.repo_id, access, store.commit).listing()
    if entries is None:
        message = f"no listing of {store.repo_id} at {store.commit} is here to compare with"
        what = "model.digest" if terms.signature is None else "the signature"
        raise ModelLoadError(f"{message} {what}, and the Hub does not answer")
    _refuse_others(store, entries)
    hashes = listed_hashes(entries)
    _refuse(model, terms, store.snapshot, hashes, _other_digest(terms, hashes), whole=False)


def require_source_copy(store: Store, model: ModelConfig, access: AccessConfig) -> None:
    """Compare the copy of a source with `model.digest` and the signature that are wanted.

    Raises:
        AccessDenied: the source refuses.
        ModelLoadError: the copy is another one, or nobody can say.
    """
    terms = Terms.of(model, access)
    if not terms.wants_files:
        return
    entries = read_listing(store.repo_id, store.commit) or {}
    _refuse_others(store, entries)
    here = {name: str(entry.lfs_sha256) for name, entry in entries.items()}
    fault = None
    with raising(model), opened(model, access, timeout_s=TIMEOUT_S) as source:
        items = listing_of(source)
        require_pin(items, store.commit)
        if terms.digest is not None:
            listed = content_hashes(source, items)
            fault = digest_fault(terms.digest, digest_of(listed)) or _other(store, here, listed)
    known = {name: here.get(name, "") for name in items}
    _refuse(model, terms, store.snapshot, known, fault, whole=False)


def _other_digest(terms: Terms, hashes: dict[str, str]) -> str | None:
    """Return how the digest of these files differs; None if it is right, or none is wanted."""
    return digest_fault(terms.digest, None if terms.digest is None else digest_of(hashes))


def _refuse(
    model: ModelConfig,
    terms: Terms,
    directory: Path,
    hashes: dict[str, str],
    fault: str | None,
    *,
    whole: bool,
) -> None:
    """Raise ModelLoadError for a fault of the digest, or else for one of the signature."""
    try:
        if fault is None and terms.signature is not None:
            require_signed(directory, hashes, terms.signature, whole=whole)
    except Unverified as unverified:
        fault = unverified.message
    if fault is not None:
        raise ModelLoadError(f"{model.source} is not loaded: {fault}")


def _refuse_others(store: Store, entries: Entries) -> None:
    """Refuse a copy with a file that is not the listed one; those that were hashed are known."""
    try:
        wrong = store.missing(
            choose(entries, lambda file: on_disk(store.snapshot, file)), remove=False
        )
        names = [file.path for file in wrong]
    except NotHere as absent:
        names = [str(absent)]
    for path in sorted(store.snapshot.rglob("*")):
        name = path.relative_to(store.snapshot).as_posix()
        is_weights = name.endswith(".safetensors")
        if name not in entries and not path.is_dir() and (is_weights or is_read(name)):
            names.append(name)
    if names:
        what = f"the copy of {store.repo_id} in {store.snapshot}"
        raise ModelLoadError(f"{what} has files that are not of the commit: {names[0]}")


def _other(store: Store, here: Mapping[str, str], listed: Mapping[str, str]) -> str | None:
    """Name a file of the copy that has another content than the digest was made of."""
    for name, sha256 in here.items():
        is_large = len(listed[name]) == 64
        content = b"" if is_large else (store.snapshot / name).read_bytes()
        found = sha256 if is_large else content_hash(content, listed[name])
        if found != listed[name]:
            return f"{name} is here with other bytes than model.digest names"
    return None
