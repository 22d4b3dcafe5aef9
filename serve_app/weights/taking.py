"""A node's part in a swarm: it does what the swarm orders, and says what came of it."""

from __future__ import annotations

import hashlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from typing import Any, BinaryIO, Protocol, cast

import structlog

from serve_app.access.hub.download import HubDownload
from serve_app.access.hub.listing import HubFile
from serve_app.access.hub.pace import Pace, Stalled
from serve_app.weights.from_hub import FETCHERS, came_wrong, fetch_chunked
from serve_app.weights.partial import Partial, Span, Stale, Writer
from serve_app.weights.pieces import Answer, Failed, File, Got, Order, Report
from serve_app.weights.store import Damaged, Store
from serve_app.weights.swarm import Unknown

log = structlog.get_logger()

SLOTS = 8  # pieces at a time from other nodes, which bounds the memory
STREAMS = FETCHERS  # requests at a time to the Hub
HASHERS = 4  # files at a time
REJOINS = 5  # without a report in between, after which the swarm counts as lost
MOVED_S = 1.0  # between two looks at how much is on the disk


class Silent(Exception):
    """A node does not give the piece; says why."""


class SwarmLost(Exception):
    """Nobody answers who would know the other nodes."""


class Tracks(Protocol):
    """The swarm, wherever it is; its methods raise `Unknown` and `SwarmLost`."""

    def join(
        self,
        files: Iterable[File],
        *,
        chunked: Iterable[File],
        whole: Iterable[File],
        here: Mapping[File, Mapping[int, str]],
    ) -> dict[File, tuple[int, set[int]]]:
        """See `Swarm.join`."""

    def exchange(self, report: Report) -> Answer:
        """See `Swarm.exchange`."""


Read = Callable[[str, str, tuple[int, int]], Iterator[bytes]]
"""From a node, of a hash, a part: in chunks; raises `Silent`."""


class Taking:
    """Fills a store with files, by the orders of a swarm.

    Args:
        store: this node's cache, locked.
        hub: the commit.
        tracker: the swarm.
        read: asks another node for a piece.
        piece_bytes: the same for all nodes of the swarm.
    """

    def __init__(
        self, store: Store, hub: HubDownload, tracker: Tracks, read: Read, piece_bytes: int
    ) -> None:
        self._store = store
        self._hub = hub
        self._tracker = tracker
        self._read = read
        self._piece_bytes = piece_bytes
        self._pool = ThreadPoolExecutor(SLOTS + STREAMS + HASHERS, thread_name_prefix="weights")
        self._lacking: dict[File, HubFile] = {}
        self._partials: dict[File, Partial] = {}
        self._whole: list[File] = []
        self._hashing: set[File] = set()
        self._by_hub: Counter[File] = Counter()  # pieces that the Hub sent to us
        self._wrong: Counter[File] = Counter()  # how often it did not come out
        self._no_chunks: set[File] = set()
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._report: dict[str, list[Any]] = {}
        self._over = threading.Event()
        self._counting = threading.Lock()
        self._slots, self._streams = SLOTS, STREAMS
        self._on_disk, self._looked = 0, 0.0
        self.peer_bytes = 0
        self.hub_bytes = 0
        self.sources: set[str] = set()

    def run(self, missing: Sequence[HubFile], whole: Sequence[HubFile] = ()) -> None:
        """Take files until all are whole.

        Args:
            missing: each content once.
            whole: other files of the commit, which are here.

        Raises:
            AccessDenied: the Hub refuses.
            ModelLoadError: the Hub does not give what this node was to take from it.
            SwarmLost: the rest has to come another way.
            OSError: this node cannot store it.
        """
        self._whole = [self._cut(file) for file in whole if file.size]
        with self._pool:
            try:
                self._open(missing)
                self._join()
                self._work()
            finally:
                self._over.set()

    def _cut(self, file: HubFile) -> File:
        return File(file.etag, file.size, self._piece_bytes)

    def _open(self, missing: Sequence[HubFile]) -> None:
        for hub_file in missing:
            if not hub_file.size:
                with self._store.appending(hub_file):
                    pass
                self._store.accept(hub_file)
                continue
            file = self._cut(hub_file)
            self._lacking[file] = hub_file
            self._partials[file] = self._store.pieces(hub_file, file)
        for _ in self._pool.map(Partial.load, self._partials.values()):
            pass

    def _join(self) -> None:
        joined = self._tracker.join(
            list(self._lacking),
            chunked=[
                file
                for file, hub_file in self._lacking.items()
                if hub_file.xet_hash and file not in self._no_chunks
            ],
            whole=self._whole,
            here={file: dict(self._partials[file].here) for file in self._lacking},
        )
        for file, (edition, right) in joined.items():
            self._partials[file].belong(edition, right)

    def _work(self) -> None:
        for file in self._lacking:
            self._hash_if_full(file)  # all but the last step may have been done before
        rejoins = 0
        while self._lacking or self._report:
            said, self._report = self._report, {}
            report = Report(self._moved(), self._slots, self._streams, **said)
            try:
                answer = self._tracker.exchange(report)
            except Unknown:
                if (rejoins := rejoins + 1) > REJOINS:
                    raise SwarmLost("the swarm forgets this node") from None
                self._join()
                continue
            rejoins = 0
            for order in answer.orders:
                self._obey(order)
            self._listen(answer.wait_s)

    def _listen(self, wait_s: float) -> None:
        """Note what happens, for some time."""
        until = time.monotonic() + wait_s
        with suppress(queue.Empty):
            while self._lacking:
                self._events.get(timeout=max(0.0, until - time.monotonic()))()

    def _say(self, kind: str, fact: object) -> None:
        self._report.setdefault(kind, []).append(fact)

    def _moved(self) -> int:
        now = time.monotonic()
        if now - self._looked > MOVED_S:
            self._on_disk, self._looked = self._store.progress(), now
        return self.peer_bytes + self.hub_bytes + self._on_disk

    def _obey(self, order: Order) -> None:
        hub_file = self._lacking.get(order.file)
        if hub_file is None or order.file in self._hashing:
            return
        self._partials[order.file].belong(order.edition)
        if order.source is None:
            self._streams -= 1
            self._start(self._from_hub, order, hub_file)
        else:
            self._slots -= 1
            self._start(self._from_node, order, order.source)

    def _start(self, work: Callable[..., None], *about: object) -> None:
        done = self._pool.submit(work, *about)
        # What was raised there is raised in the loop.
        done.add_done_callback(lambda future: self._events.put(future.result))

    def _from_node(self, order: Order, source: str) -> None:
        failed = None
        try:
            with self._partials[order.file].writing(order.edition) as writer:
                digest = self._receive(order, source, writer)
                writer.keep(order.first, digest)
        except Stale:
            pass
        except (Silent, Stalled, Damaged) as error:
            failed = Failed(order, is_wrong=isinstance(error, Damaged))
            log.warning(
                "weights.peer_failed",
                peer=source,
                repo_id=self._store.repo_id,
                reason=f"{type(error).__name__}: {error}",
            )
        else:
            got = Got(order.file, order.first, digest, source, order.edition)
            self._events.put(lambda: self._came(got))
        self._events.put(lambda: self._slot_free(failed))

    def _receive(self, order: Order, source: str, writer: Writer) -> str:
        """Write one piece, and of what a node sends no byte more; returns its hash."""
        (offset, stop), digest, pace = order.file.bounds(order.first), hashlib.sha256(), Pace()
        for chunk in self._read(source, order.file.etag, (offset, stop)):
            self._require_wanted()
            if len(chunk) > stop - offset:
                raise Damaged("more bytes than the piece has")
            writer.put(offset, chunk)
            digest.update(chunk)
            offset += len(chunk)
            self._count(peer=len(chunk))
            pace.moved(len(chunk))
        if offset < stop:
            raise Silent("it ends too early")
        found = digest.hexdigest()
        if found != (order.digest or found):
            raise Damaged("other bytes than were stated")
        return found

    def _from_hub(self, order: Order, hub_file: HubFile) -> None:
        file = order.file
        if order.pieces == file.pieces and hub_file.xet_hash and file not in self._no_chunks:
            if fetch_chunked(self._store, self._hub, hub_file):
                self._count(hub=file.size)
                self._partials[file].finish()
                self._events.put(lambda: self._proven(file))
                self._events.put(self._stream_free)
                return
            self._no_chunks.add(file)

        def kept(piece: int, digest: str) -> None:
            got = Got(file, piece, digest, None, order.edition)
            self._events.put(lambda: self._came(got))

        def wrote(count: int) -> None:
            self._count(hub=count)
            self._require_wanted()

        with suppress(Stale), self._partials[file].writing(order.edition) as writer:
            span = Span(writer, file, order.first, order.pieces, kept=kept, wrote=wrote)
            self._hub.fetch(hub_file, lambda: nullcontext(cast("BinaryIO", span)), stop=span.stop)
        self._events.put(self._stream_free)

    def _require_wanted(self) -> None:
        if self._over.is_set():
            raise Stale("nobody waits for it any more")

    def _count(self, *, peer: int = 0, hub: int = 0) -> None:
        with self._counting:
            self.peer_bytes += peer
            self.hub_bytes += hub

    # In the loop again.

    def _slot_free(self, failed: Failed | None) -> None:
        self._slots += 1
        if failed:
            self._say("failed", failed)

    def _stream_free(self) -> None:
        self._streams += 1

    def _came(self, got: Got) -> None:
        self._say("got", got)
        if got.source is None:
            self._by_hub[got.file] += 1
        else:
            self.sources.add(got.source)
        self._hash_if_full(got.file)

    def _hash_if_full(self, file: File) -> None:
        if file in self._lacking and file not in self._hashing and self._partials[file].is_full:
            self._hashing.add(file)
            self._start(self._hash, file, self._lacking[file])

    def _hash(self, file: File, hub_file: HubFile) -> None:
        partial = self._partials[file]
        edition = partial.close()  # so that nobody writes any more to what is hashed
        try:
            self._store.accept(hub_file)
        except Damaged:
            partial.reset()
            self._events.put(lambda: self._refuted(file, edition))
        else:
            partial.finish()
            self._events.put(lambda: self._proven(file))

    def _proven(self, file: File) -> None:
        self._hashing.discard(file)
        if self._lacking.pop(file, None):
            self._whole.append(file)
            self._say("proven", file)

    def _refuted(self, file: File, edition: int) -> None:
        hub_file = self._lacking[file]
        self._hashing.discard(file)
        self._say("refuted", (file, edition))
        log.warning("weights.refuted", repo_id=self._store.repo_id, file=hub_file.path)
        if self._by_hub.pop(file, 0) >= file.pieces:
            self._wrong[file] += 1
            if self._wrong[file] > 1:
                raise came_wrong(self._store, hub_file)
