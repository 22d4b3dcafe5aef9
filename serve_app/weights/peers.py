"""The other nodes of the cluster: who has the weights, who fetches them, their bytes over Ray.

One node at a time asks the Hub; the others wait for it and take the files from whoever has them
whole. All that nodes know of each other stands in Ray's key-value store: `has/<node>` says
where a node keeps the files, `claim/<n>` that somebody fetches them. A claim that makes no
progress loses to the next number, by the waiter's own clock; a node that is lost or lies is
passed over. So nobody waits for a dead leader, and in the worst case everybody asks the Hub.

A node comes here only after its own token was proven, and the hashes that every byte is checked
against are those that the Hub gave to that token.
"""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
import structlog
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve_app.access.hub.listing import HubFile
from serve_app.access.hub.pace import Pace, Stalled
from serve_app.config import ModelConfig
from serve_app.weights.announcements import Announcements
from serve_app.weights.chunks import CHUNK_BYTES, read_chunks
from serve_app.weights.store import Damaged, Store

log = structlog.get_logger()

IN_FLIGHT = 4  # chunks between two nodes, which bounds the memory of both object stores
BEAT_S = 1.0  # of a leader
SILENT_S = 15.0  # without a beat, after which a leader is dead
STALL_S = 120.0  # without one more byte; a slow Hub sends 10 MiB of a file at a time
CHUNK_S = 30.0  # for the next chunk of a peer, whose worker may have to start first
POLL_S = 0.5


class Silent(Exception):
    """A peer sends nothing any more."""


class Peers:
    """One commit, as the nodes of the cluster share it.

    Args:
        repo_id: the repository.
        commit: 40 hex digits.
        silent_s: how long a leader may be without a sign of life.
    """

    def __init__(self, repo_id: str, commit: str, *, silent_s: float = SILENT_S) -> None:
        self._commit = (repo_id, commit)
        self._keys = Announcements(repo_id, commit)
        self._node: str = ray.get_runtime_context().get_node_id()
        self._silent_s = silent_s
        self.received_bytes = 0
        self._passed_over: set[str] = set()
        self._claim = 0
        self._seen: dict[str, tuple[object, float]] = {}

    @classmethod
    def of(cls, model: ModelConfig, commit: str | None) -> Peers | None:
        """Return the other nodes for a model; None where nothing is shared between them."""
        shares = model.share_weights and model.repo_id is not None and commit is not None
        return cls(str(model.repo_id), str(commit)) if shares else None

    @contextmanager
    def taking_part(self, store: Store) -> Iterator[None]:
        """Show the others that files come if we lead, and at the end that they are here whole.

        The lead ends here in any case, so that a waiter takes it over at once.
        """
        over = threading.Event()
        beating = threading.Thread(target=self._beat, args=(store, over), daemon=True)
        beating.start()
        try:
            yield
            with suppress(RayError):
                self._keys.put(f"has/{self._node}", str(store.blobs))
        finally:
            over.set()
            beating.join()
            with suppress(RayError):
                self._release()

    def fill(self, store: Store, files: Sequence[HubFile]) -> None:
        """Take the missing files from other nodes; return when all are here or we lead.

        Args:
            store: this node's cache, locked.
            files: of the commit.

        Raises:
            OSError: this node cannot store them.
        """
        try:
            while missing := store.missing(files):
                source = self._pick()
                if source is not None:
                    self._copy(source, store, missing)
                elif self._leads():
                    return
                else:
                    time.sleep(POLL_S)
        except RayError as error:  # the key-value store does not answer: everybody for himself
            log.warning("weights.peers_unknown", repo_id=store.repo_id, reason=_words(error))

    def _leads(self) -> bool:
        """Claim the lead if nobody has it, or if nothing comes of the present one."""
        newest = max(self._claims(), default=0)
        claim = self._keys.get(f"claim/{newest}") if newest else None
        if claim is not None and not self._is_over(newest, claim):
            return False
        # Of all that claim the same number at once the store lets one succeed.
        value = self._sign_of_life(beat=0, size=0)
        if not self._keys.put(f"claim/{newest + 1}", value, overwrite=False):
            return False
        self._claim = newest + 1
        return True

    def _is_over(self, number: int, claim: bytes) -> bool:
        try:
            sign = json.loads(claim)
            node, beat, size = sign["node"], sign["beat"], sign["bytes"]
        except (ValueError, TypeError, KeyError, RecursionError):  # nobody of ours wrote that
            return True
        # On our own node we hold the lock, so who claimed there before has died.
        if node == self._node or node not in _alive():
            return True
        # Compared with what we saw before, not with the time in it: clocks of two nodes differ.
        silent_s = self._unchanged_s("beat", (number, beat))
        stalled_s = self._unchanged_s("bytes", (number, size))
        return silent_s > self._silent_s or stalled_s > STALL_S

    def _unchanged_s(self, name: str, value: object) -> float:
        """Return for how long we have seen the same value, by our own clock."""
        now = time.monotonic()
        if name not in self._seen or self._seen[name][0] != value:
            self._seen[name] = (value, now)
        return now - self._seen[name][1]

    def _beat(self, store: Store, over: threading.Event) -> None:
        for beat in itertools.count(1):
            if over.wait(BEAT_S):
                return
            if self._claim:
                with suppress(RayError):
                    value = self._sign_of_life(beat=beat, size=store.progress())
                    self._keys.put(f"claim/{self._claim}", value)

    def _sign_of_life(self, *, beat: int, size: int) -> str:
        return json.dumps({"node": self._node, "beat": beat, "bytes": size})

    def _release(self) -> None:
        for number in self._claims() if self._claim else ():
            if number <= self._claim:
                self._keys.delete(f"claim/{number}")
        self._claim = 0

    def _pick(self) -> str | None:
        """Return some node that has the files."""
        nodes, alive = set(self._keys.below("has")), _alive()
        for lost in nodes - alive:
            self._keys.delete(f"has/{lost}")
        # By chance, so that many nodes at a time do not all read from the first one.
        usable = sorted(nodes & alive - self._passed_over - {self._node})
        return random.choice(usable) if usable else None  # noqa: S311

    def _copy(self, node: str, store: Store, missing: Sequence[HubFile]) -> None:
        """Take files from a node, as many as it gives; a bad one is not asked again."""
        started, before = time.monotonic(), self.received_bytes
        wanted = [(file.etag, store.begun_bytes(file)) for file in missing]
        chunks = _start(node, *self._commit, wanted)
        try:
            for file in missing:
                self._receive(chunks, store, file)
                store.accept(file)
        except (RayError, StopIteration, Silent, Stalled, Damaged) as error:
            self._passed_over.add(node)
            ray.cancel(chunks)
            log.warning(
                "weights.peer_failed", peer=node, repo_id=store.repo_id, reason=_words(error)
            )
        else:
            log.info(
                "weights.copied",
                peer=node,
                repo_id=store.repo_id,
                received_bytes=self.received_bytes - before,
                copy_s=round(time.monotonic() - started, 3),
            )

    def _receive(self, chunks: Any, store: Store, file: HubFile) -> None:
        """Take one file, and of what a peer sends no byte more than the Hub lists."""
        have, pace = store.begun_bytes(file), Pace()
        with store.appending(file) as stream:
            stream.truncate(have)  # 0 where more was there than the file has
            stream.seek(have)
            while have < file.size:
                chunk = self._next(chunks)
                if not 0 < len(chunk) <= min(CHUNK_BYTES, file.size - have):
                    raise Damaged(file.path)
                stream.write(chunk)
                have += len(chunk)
                self.received_bytes += len(chunk)
                pace.moved(len(chunk))

    def _next(self, chunks: Any) -> bytes:
        ready, _ = ray.wait([chunks], timeout=CHUNK_S)
        if not ready:
            raise Silent
        chunk = ray.get(next(chunks), timeout=CHUNK_S)
        return chunk if isinstance(chunk, bytes) else b""

    def _claims(self) -> list[int]:
        return [int(number) for number in self._keys.below("claim") if number.isdecimal()]


def _start(node: str, repo_id: str, commit: str, wanted: list[tuple[str, int]]) -> Any:
    """Run `read_chunks` on a node; it goes on only as fast as we read."""
    task: Any = ray.remote(read_chunks)
    return task.options(
        name="serve_app.weights",
        num_cpus=0,
        num_returns="streaming",
        max_retries=0,
        _generator_backpressure_num_objects=IN_FLIGHT,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote(repo_id, commit, wanted)


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]
