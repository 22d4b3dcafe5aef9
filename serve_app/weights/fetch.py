"""START HERE: a pinned commit into this node's cache, from whoever has it.

    here, whole and verified?  ─► done
    other nodes have of it?    ─► its pieces over Ray
    nobody has it?             ─► the Hub, each piece by one node of the cluster

Whatever the source, a file counts only when its hash is the one that the Hub states.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from serve_app.access.hub.download import HubDownload
from serve_app.access.hub.listing import HubFile, cache
from serve_app.access.hub.model_files import listed
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import ModelLoadError
from serve_app.weights.copies import linked_files
from serve_app.weights.from_hub import fetch_from_hub
from serve_app.weights.from_source import downloading
from serve_app.weights.peers import Peers
from serve_app.weights.provenance import require_copy, require_directory, require_source_copy
from serve_app.weights.store import Store

log = structlog.get_logger()

Progress = Callable[[int, int], None]
TELL_S = 2.0
IMPATIENT_S = 10.0  # for a listing of what is here whole, as far as its own names say


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where the model is now, and where its bytes came from.

    Args:
        directory: config, tokenizer and weights.
        hub_bytes: fetched from the Hub, or the store at `model.url`.
        peer_bytes: fetched from other nodes.
        cache_bytes: were here.
    """

    directory: Path
    hub_bytes: int = 0
    peer_bytes: int = 0
    cache_bytes: int = 0

    def bytes_by_source(self) -> dict[str, int]:
        """Return the bytes under the names of logs and metrics."""
        return {"hub": self.hub_bytes, "peer": self.peer_bytes, "cache": self.cache_bytes}


def joined(fetched: Sequence[Fetched]) -> Fetched:
    """Return the first with the bytes of all."""
    return Fetched(
        fetched[0].directory,
        hub_bytes=sum(each.hub_bytes for each in fetched),
        peer_bytes=sum(each.peer_bytes for each in fetched),
        cache_bytes=sum(each.cache_bytes for each in fetched),
    )


def fetch(
    model: ModelConfig,
    access: AccessConfig,
    commit: str | None,
    *,
    offline: bool = False,
    peers: Peers | None = None,
    progress: Progress | None = None,
) -> Fetched:
    """Fetch the pinned commit into this node's cache; replicas of one node share it.

    Args:
        model: what is to be read; a local `path` is returned as it is.
        access: which token, which Hub.
        commit: 40 hex digits, from the gate.
        offline: take the copy that is here; the Hub is known not to answer.
        peers: the other nodes; None asks the Hub only.
        progress: called every two seconds with the bytes that are here and those of the whole.

    Raises:
        AccessDenied: the Hub refuses although the probe was granted a moment ago.
        ModelLoadError: the files cannot be fetched here (network, disk), or are not those that
            `model.digest` names, or that the signer signed.
    """
    if model.path is not None:
        require_directory(model, access)
        return Fetched(Path(model.path).expanduser())
    if commit is None:
        raise ModelLoadError(f"no commit of {model.source} was pinned; the gate must come first")
    try:
        store = Store(model.cache_id, commit)
        if model.url is not None:
            fetched = _from_source(store, model, access, progress)
            require_source_copy(store, model, access)
        else:
            fetched = _into_cache(store, access, offline=offline, peers=peers, progress=progress)
            require_copy(store, model, access, offline=offline)
    except (OSError, ValueError, RecursionError) as error:
        # A raw exception would let Serve start the replica again at once, and again.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ModelLoadError(f"{model.source} cannot be stored in {cache()}: {reason}") from None
    return fetched


def _into_cache(
    store: Store,
    access: AccessConfig,
    *,
    offline: bool,
    peers: Peers | None,
    progress: Progress | None,
) -> Fetched:
    if found := _whole(store, listed(store.repo_id, store.commit), peers):
        return found
    if offline:
        return _here(store)
    hub = HubDownload(store.repo_id, access, store.commit)
    if found := _unlisted(store, hub, peers):
        return found
    with _locked(store):
        return _fill(store, hub, peers, progress)


def _from_source(
    store: Store, model: ModelConfig, access: AccessConfig, progress: Progress | None
) -> Fetched:
    if found := _whole(store, listed(store.repo_id, store.commit)):
        return found
    with downloading(model, access, store.commit) as download, store.locked():
        # The process that had the lock before may have fetched it all.
        if found := _whole(store, listed(store.repo_id, store.commit)):
            return found
        files = download.files()
        lacking = store.lacking_bytes(files)
        store.require_room(files, files)
        with _reporting(progress, store, files):
            named = download.fetch(store, files)
        store.link(named)
    return Fetched(store.snapshot, hub_bytes=lacking, cache_bytes=max(0, _total(named) - lacking))


def lacking_bytes(model: ModelConfig, access: AccessConfig, commit: str) -> int:
    """Return how many bytes of a commit are not in this node's cache yet.

    Raises:
        AccessDenied: the Hub refuses.
        ModelLoadError: the Hub does not answer.
    """
    store = Store(model.cache_id, commit)
    if model.url is not None:
        kept = listed(store.repo_id, store.commit)
        if kept is not None and not store.absent(kept):
            return 0
        with downloading(model, access, commit) as download:
            return store.lacking_bytes(download.files())
    files = HubDownload(str(model.repo_id), access, commit).files()
    return store.lacking_bytes(store.absent(files))


def _whole(
    store: Store, files: Sequence[HubFile] | None, peers: Peers | None = None
) -> Fetched | None:
    """Return the copy that is here if nothing is to be done for it.

    Takes no lock and needs to write nothing, so a cache that may only be read serves as well.
    """
    if not files or store.absent(files) or not store.is_linked(files):
        return None
    if store.missing(files, remove=False):
        return None
    if peers:
        peers.announce()
    return Fetched(store.snapshot, cache_bytes=_total(files))


def _unlisted(store: Store, hub: HubDownload, peers: Peers | None) -> Fetched | None:
    """Return a copy that another tool made, if the Hub's listing finds nothing wrong with it.

    Where the Hub gives none (overloaded, say), the names of the copy itself are enough: access
    was proven a moment ago, and the hashes in them are checked.
    """
    if listed(store.repo_id, store.commit) is not None:
        return None
    files = linked_files(store.snapshot)
    if files is None:
        return None
    with suppress(ModelLoadError):
        files = hub.files(budget_s=IMPATIENT_S)
    return _whole(store, files, peers)


def _here(store: Store) -> Fetched:
    """Return the copy that is here, verified as far as its names say what it must hold.

    Raises:
        ModelLoadError: there is none, or it is not whole.
    """
    files = listed(store.repo_id, store.commit)
    if files is None:  # another tool made it, and did not keep the listing
        files = linked_files(store.snapshot)
        if found := _whole(store, files):
            return found
    elif store.absent(files) or not store.is_linked(files):
        files = ()
    if not files:
        message = f"{cache()} has no complete copy of {store.repo_id} at {store.commit}"
        raise ModelLoadError(message)
    names = ", ".join(file.path for file in store.missing(files, remove=False)[:5])
    raise ModelLoadError(f"{cache()} had a damaged copy of {store.repo_id}: {names}")


@contextmanager
def _locked(store: Store) -> Iterator[None]:
    """Lock the store; where that cannot be, say what its copy lacks."""
    entered = False
    try:
        with store.locked():
            entered = True
            yield
    except ModelLoadError as error:
        files = [] if entered else store.absent(listed(store.repo_id, store.commit) or ())
        if not files:
            raise
        lacks = f"its copy of {store.repo_id} lacks {len(files)} files, {files[0].path} first"
        raise ModelLoadError(f"{error.message}; {lacks}") from None


def _fill(
    store: Store, hub: HubDownload, peers: Peers | None, progress: Progress | None
) -> Fetched:
    files = hub.files()
    missing = store.missing(files)
    hub_bytes = peer_bytes = 0
    store.require_room(files, missing)
    with _reporting(progress, store, files):
        if peers and missing:
            lacking = {file.etag for file in missing}
            peers.fill(store, hub, missing, [f for f in files if f.etag not in lacking])
            hub_bytes, peer_bytes = peers.hub_bytes, peers.received_bytes
            missing = store.missing(missing)
        if missing:
            hub_bytes += store.lacking_bytes(missing)
            fetch_from_hub(store, hub, missing)
        store.link(files)
    if peers:
        peers.announce()
    here = max(0, _total(files) - hub_bytes - peer_bytes)
    if old := store.old_revisions(files):
        log.info("weights.outdated", repo_id=store.repo_id, revisions=old)
    return Fetched(store.snapshot, hub_bytes, peer_bytes, here)


def _total(files: Sequence[HubFile]) -> int:
    return sum({file.etag: file.size for file in files}.values())


@contextmanager
def _reporting(progress: Progress | None, store: Store, files: Sequence[HubFile]) -> Iterator[None]:
    """Report how much is here, whoever fetches it, for as long as it comes."""
    total = _total(files)
    over = threading.Event()

    def watch(progress: Progress) -> None:
        while not over.wait(TELL_S):
            progress(total - store.lacking_bytes(store.absent(files)), total)

    watching = threading.Thread(target=watch, args=(progress,), daemon=True)
    if progress:
        watching.start()
    try:
        yield
    finally:
        over.set()
        if progress:
            watching.join()
