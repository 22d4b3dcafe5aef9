"""The other nodes of the cluster, as one commit's weights go through them: over Ray.

A node comes here only after its own token was proven, and the hashes that every file is checked
against are those that the Hub gave to that token. Nodes take pieces from each other and from the
Hub as `swarm.py` decides; where the swarm cannot be reached, everybody asks the Hub.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import ray
import structlog
from ray.exceptions import RayError

from serve_app.access.hub.download import HubDownload
from serve_app.access.hub.listing import HubFile
from serve_app.cluster.placement import living_nodes
from serve_app.config import ModelConfig
from serve_app.weights.announcements import Announcements, member_name
from serve_app.weights.chunks import start_reading
from serve_app.weights.pieces import PIECE_BYTES
from serve_app.weights.store import Store
from serve_app.weights.swarm import SILENT_S
from serve_app.weights.taking import Silent, SwarmLost, Taking
from serve_app.weights.tracker import Tracking

log = structlog.get_logger()

FIRST_S = 30.0  # for the first chunk of a piece: the node's process may have to start
CHUNK_S = 10.0  # for each of the others


class Peers:
    """One commit, as the nodes of the cluster share it.

    Args:
        repo_id: the repository.
        commit: 40 hex digits.
        silent_s: without a report for so long, what a node was to do is for others.
        piece_bytes: the same for all nodes.
    """

    def __init__(
        self,
        repo_id: str,
        commit: str,
        *,
        silent_s: float = SILENT_S,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self._commit = (repo_id, commit)
        self._keys = Announcements(repo_id, commit)
        self._name = member_name()
        self._silent_s = silent_s
        self._piece_bytes = piece_bytes
        self.hub_bytes = 0
        self.received_bytes = 0

    @classmethod
    def of(cls, model: ModelConfig, commit: str | None) -> Peers | None:
        """Return the other nodes for a model; None where nothing is shared between them."""
        shares = model.share_weights and model.repo_id is not None and commit is not None
        return cls(str(model.repo_id), str(commit)) if shares else None

    def announce(self) -> None:
        """Say that the commit is here whole; others may ask for it from now on."""
        with suppress(RayError):
            self._keys.put(f"has/{self._name}", "")
            self._keys.delete(f"part/{self._name}")

    def fill(
        self, store: Store, hub: HubDownload, missing: Sequence[HubFile], whole: Sequence[HubFile]
    ) -> None:
        """Take the missing files, from other nodes and of what none has a part from the Hub.

        Args:
            store: this node's cache, locked.
            hub: the commit, by this node's own token.
            missing: files of the commit, each content once; not all of them are here afterwards
                if there is no other node, or if the swarm is lost.
            whole: the others.

        Raises:
            AccessDenied: the Hub refuses.
            ModelLoadError: the Hub does not give what this node was to take from it.
            OSError: this node cannot store them.
        """
        try:
            if len(living_nodes()) < 2:
                return  # nobody to share with, and an actor less to wait for
        except RayError as error:
            log.warning("weights.peers_unknown", repo_id=store.repo_id, reason=_words(error))
            return
        name = "-".join(filter(None, (self._name, store.own_suffix)))
        tracking = Tracking(self._commit, name, silent_s=self._silent_s)
        taking = Taking(store, hub, tracking, self._read, self._piece_bytes)
        started = time.monotonic()
        try:
            with self._taking_part(tracking):
                taking.run(missing, whole)
        except (RayError, SwarmLost) as error:
            log.warning("weights.peers_unknown", repo_id=store.repo_id, reason=_words(error))
        finally:
            self.hub_bytes += taking.hub_bytes
            self.received_bytes += taking.peer_bytes
        if taking.sources:
            log.info(
                "weights.copied",
                peers=len(taking.sources),
                repo_id=store.repo_id,
                received_bytes=taking.peer_bytes,
                copy_s=round(time.monotonic() - started, 3),
            )

    @contextmanager
    def _taking_part(self, tracking: Tracking) -> Iterator[None]:
        """Hand out what is here already for as long as the rest comes."""
        self._keys.put(f"part/{self._name}", "")
        try:
            yield
        finally:
            with suppress(RayError):
                tracking.leave()

    def _read(self, source: str, etag: str, span: tuple[int, int]) -> Iterator[bytes]:
        timeout_s = FIRST_S
        try:
            chunks = start_reading(source, *self._commit, etag, span)
            try:
                while True:
                    ready, _ = ray.wait([chunks], timeout=timeout_s)
                    if not ready:
                        raise Silent(f"nothing for {timeout_s:g} s")
                    chunk = ray.get(next(chunks), timeout=timeout_s)
                    if not isinstance(chunk, bytes) or not chunk:
                        raise Silent("it sends something else than bytes")
                    yield chunk
                    timeout_s = CHUNK_S
            except StopIteration:
                return
            finally:
                ray.cancel(chunks)
        except RayError as error:
            raise Silent(_words(error)) from None


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
