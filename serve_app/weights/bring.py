"""START HERE: a pinned commit into this node's cache, from whoever has it.

    here, whole and verified?  ─► done
    another node has it?       ─► its bytes over Ray
    nobody has it?             ─► the Hub, one node of the cluster at a time

Whatever the source, a file counts only when its hash is the one that the Hub tells.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import structlog

from serve_app.access.download import HubDownload, HubFile, cache, cached_snapshot, listed
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import ModelLoadError
from serve_app.weights.peers import Peers
from serve_app.weights.store import Damaged, Store

log = structlog.get_logger()

Tell = Callable[[int, int], None]
TELL_S = 2.0
FETCHERS = 8  # files at a time from the Hub, as huggingface_hub does it


@dataclass(frozen=True, slots=True)
class Brought:
    """Where the model is now, and where its bytes came from.

    Args:
        directory: config, tokenizer and weights.
        hub_bytes: fetched from the Hub.
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


def bring(
    model: ModelConfig,
    access: AccessConfig,
    commit: str | None,
    *,
    offline: bool = False,
    peers: Peers | None = None,
    tell: Tell | None = None,
) -> Brought:
    """Bring the pinned commit into this node's cache; replicas of one node share it.

    Args:
        model: what is to be read; a local `path` is returned as it is.
        access: which token, which Hub.
        commit: 40 hex digits, from the gate.
        offline: take the copy that is here; the Hub is known not to answer.
        peers: the other nodes; None asks the Hub only.
        tell: called every two seconds with the bytes that are here and those of the whole.

    Raises:
        AccessDenied: the Hub refuses although the probe was granted a moment ago.
        ModelLoadError: the files cannot be brought here (network, disk).
    """
    if model.path is not None:
        return Brought(Path(model.path).expanduser())
    repo_id = str(model.repo_id)
    if commit is None:
        raise ModelLoadError(f"no commit of {repo_id} was pinned; the gate must come first")
    store = Store(repo_id, commit)
    with store.locked():
        if offline:
            return _here(store)
        hub = HubDownload(repo_id, access, commit)
        try:
            brought = _fill(store, hub, peers, tell)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise ModelLoadError(f"{repo_id} cannot be stored in {cache()}: {reason}") from None
    return brought


def lacking_bytes(model: ModelConfig, access: AccessConfig, commit: str) -> int:
    """Return how many bytes of a commit are not in this node's cache yet.

    Raises:
        AccessDenied: the Hub refuses.
        ModelLoadError: the Hub does not answer.
    """
    store = Store(str(model.repo_id), commit)
    files = HubDownload(str(model.repo_id), access, commit).files()
    return store.lacking_bytes(store.absent(files))


def _here(store: Store) -> Brought:
    """Return the copy that is here, every file verified where the Hub was ever asked for them."""
    directory = cached_snapshot(store.repo_id, store.commit)
    files = listed(store.repo_id, store.commit) or ()
    if damaged := store.missing(files):
        names = ", ".join(file.path for file in damaged[:5])
        raise ModelLoadError(f"{cache()} had a damaged copy of {store.repo_id}: {names}")
    return Brought(directory, cache_bytes=sum(file.size for file in files))


def _fill(store: Store, hub: HubDownload, peers: Peers | None, tell: Tell | None) -> Brought:
    files = hub.files()
    missing = store.missing(files)
    hub_bytes = 0
    store.require_room(files, missing)
    with peers.taking_part(store) if peers else nullcontext(), _telling(tell, store, files):
        if peers and missing:
            peers.fill(store, missing)
            missing = store.missing(missing)
        if missing:
            hub_bytes = store.lacking_bytes(missing)
            _fetch(store, hub, missing)
        store.link(files)
    peer_bytes = peers.received_bytes if peers else 0
    total = sum({file.etag: file.size for file in files}.values())
    if old := store.old_revisions(files):
        log.info("weights.outdated", repo_id=store.repo_id, revisions=old)
    return Brought(store.snapshot, hub_bytes, peer_bytes, max(0, total - hub_bytes - peer_bytes))


@contextmanager
def _telling(tell: Tell | None, store: Store, files: Sequence[HubFile]) -> Iterator[None]:
    """Tell how much is here, whoever brings it, for as long as it comes."""
    total = sum({file.etag: file.size for file in files}.values())
    over = threading.Event()

    def watch(tell: Tell) -> None:
        while not over.wait(TELL_S):
            tell(total - store.lacking_bytes(store.absent(files)), total)

    watching = threading.Thread(target=watch, args=(tell,), daemon=True)
    if tell:
        watching.start()
    try:
        yield
    finally:
        over.set()
        if tell:
            watching.join()


def _fetch(store: Store, hub: HubDownload, files: Sequence[HubFile]) -> None:
    with ThreadPoolExecutor(FETCHERS, thread_name_prefix="weights") as pool:
        for _ in pool.map(lambda file: _fetch_file(store, hub, file), files):
            pass


def _fetch_file(store: Store, hub: HubDownload, file: HubFile) -> None:
    """Fetch one file; what a dead process left may be wrong, so once more from its first byte."""
    for again in (False, True):
        try:
            if file.in_xet:
                hub.fetch_by_xet(file, again=again)
                if store.has(file):
                    return
            else:
                hub.fetch(file, store.partial(file))
                store.accept(file)
                return
        except Damaged:
            continue
    raise ModelLoadError(f"{file.path} of {store.repo_id} came twice with other bytes than listed")
