"""Pieces of a file that is not whole yet: in the file that it becomes, and a journal beside it.

The journal has a line for each piece that is here: its first byte, the one behind its last, its
hash. A line is written when the bytes are, and nobody believes it without hashing them again
after a process has died.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from serve_app.access.hub.folders import Folder
from serve_app.weights.pieces import File

CLOSED = -1  # no list has this number
JOURNAL_BYTES = 64 << 20
READ_BYTES = 4 << 20
_LINE = re.compile(r"(\d{1,15}) (\d{1,15}) ([0-9a-f]{64})")

Spans = Mapping[tuple[int, int], str]


class Stale(Exception):
    """These bytes belong to a list of hashes that was dropped meanwhile."""


def journal_of(partial: str) -> str:
    """Return the name of the journal beside a partial file."""
    return f"pieces.{partial}"


def read_journal(blobs: Folder, partial: str) -> dict[tuple[int, int], str] | None:
    """Return the hashes of the pieces by their bounds; None for a file that has no journal."""
    try:
        with blobs.reading(journal_of(partial)) as stream:
            text = stream.read(JOURNAL_BYTES).decode("ascii", "replace")
    except OSError:
        return None
    lines = filter(None, map(_LINE.fullmatch, text.splitlines()))
    return {(int(line[1]), int(line[2])): line[3] for line in lines}


def contiguous(spans: Spans) -> int:
    """Return how many bytes are here from the first on."""
    end = 0
    for start, stop in sorted(spans):
        if start > end:
            break
        end = max(end, stop)
    return end


class Partial:
    """One file on its way; several threads may write to it.

    Args:
        blobs: opens the folder.
        name: of the partial file in it.
        file: how it is cut.
    """

    def __init__(self, blobs: Callable[[], Folder], name: str, file: File) -> None:
        self._blobs = blobs
        self._name = name
        self._lock = threading.Lock()
        self._edition: int | None = None
        self.file = file
        self.here: dict[int, str] = {}

    @property
    def is_full(self) -> bool:
        """Whether all pieces are here."""
        return len(self.here) == self.file.pieces

    def load(self) -> None:
        """Find the pieces that are here, and hash them again.

        Raises:
            OSError: the file cannot be used.
        """
        with self._lock, self._blobs() as blobs, blobs.appending(self._name) as stream:
            spans = read_journal(blobs, self._name)
            size = stream.tell()
            if spans is None:  # fetched from its first byte on
                bounds = map(self.file.bounds, range(self.file.pieces))
                spans = dict.fromkeys((span for span in bounds if span[1] <= size), "")
            found = {}
            for piece in range(self.file.pieces):
                start, stop = self.file.bounds(piece)
                stated = spans.get((start, stop))
                if stated is not None and stop <= size:
                    digest = _hash(stream, start, stop)
                    if stated in ("", digest):
                        found[piece] = digest
            self._rewrite(blobs, found)

    def belong(self, edition: int, right: set[int] | None = None) -> None:
        """Keep to one list of hashes; pieces by another one are dropped.

        Args:
            edition: its number.
            right: the pieces that are as it says, if that is known; it is the first list then.
        """
        with self._lock:
            if right is None and self._edition in (None, edition):
                self._edition = edition
                return
            self._edition = edition
            kept = {piece: self.here[piece] for piece in right or ()}
            if kept != self.here:
                with self._blobs() as blobs:
                    self._rewrite(blobs, kept)

    def close(self) -> int:
        """Let nobody write any more; returns the number of the list that it kept to."""
        with self._lock:
            edition, self._edition = self._edition, CLOSED
        return CLOSED if edition is None else edition

    def finish(self) -> None:
        """Forget the pieces: the file has become whole, and has another name."""
        with self._lock, self._blobs() as blobs:
            self._edition = CLOSED
            self._rewrite(blobs, {})

    def reset(self) -> None:
        """Begin again; the bytes are gone."""
        with self._lock, self._blobs() as blobs:
            self._edition = None
            self._rewrite(blobs, {})

    @contextmanager
    def writing(self, edition: int) -> Iterator[Writer]:
        """Open it for pieces of one list; raises OSError."""
        with self._blobs() as blobs, blobs.appending(self._name) as stream:
            yield Writer(self, stream, edition)

    def write(self, stream: BinaryIO, edition: int, offset: int, content: bytes) -> None:
        """Put bytes where they belong; raises `Stale`, OSError."""
        with self._lock:
            self._require(edition)
            rest = memoryview(content)
            while rest:
                written = os.pwrite(stream.fileno(), rest, offset)
                rest, offset = rest[written:], offset + written

    def keep(self, edition: int, piece: int, digest: str) -> None:
        """Note that a piece is here; raises `Stale`, OSError."""
        with self._lock:
            self._require(edition)
            self.here[piece] = digest
            with self._blobs() as blobs, blobs.appending(journal_of(self._name)) as journal:
                journal.write(self._line(piece).encode())

    def _require(self, edition: int) -> None:
        if edition != self._edition:
            raise Stale(self._name)

    def _rewrite(self, blobs: Folder, pieces: dict[int, str]) -> None:
        self.here = pieces
        if pieces:
            blobs.write(journal_of(self._name), "".join(map(self._line, pieces)))
        else:
            with suppress(OSError):
                blobs.unlink(journal_of(self._name))
            blobs.unlink(self._name)

    def _line(self, piece: int) -> str:
        start, stop = self.file.bounds(piece)
        return f"{start} {stop} {self.here[piece]}\n"


class Writer:
    """Writes pieces of one list, hashing as it goes.

    Args:
        partial: the file.
        stream: open on it.
        edition: the number of the list.
    """

    def __init__(self, partial: Partial, stream: BinaryIO, edition: int) -> None:
        self._partial = partial
        self._stream = stream
        self._edition = edition

    def put(self, offset: int, content: bytes) -> None:
        """Write bytes; raises `Stale`, OSError."""
        self._partial.write(self._stream, self._edition, offset, content)

    def keep(self, piece: int, digest: str) -> None:
        """Note a piece; raises `Stale`, OSError."""
        self._partial.keep(self._edition, piece, digest)


class Span:
    """Takes consecutive pieces as a download writes them: what `HubDownload.fetch` appends to.

    Args:
        writer: where to.
        file: of which.
        first: the first piece.
        count: how many.
        kept: called with each piece and its hash as soon as it is there.
        wrote: called with the bytes that were new.
    """

    def __init__(
        self,
        writer: Writer,
        file: File,
        first: int,
        count: int,
        *,
        kept: Callable[[int, str], None],
        wrote: Callable[[int], None],
    ) -> None:
        self._writer = writer
        self._file = file
        self._kept = kept
        self._wrote = wrote
        self._next, self.stop = file.bounds(first, count)
        self._at = self._next
        self._digest: Any = hashlib.sha256()

    def tell(self) -> int:
        """Return where in the file the next byte belongs."""
        return self._at

    def seek(self, offset: int) -> int:
        """Go to the file's beginning: the host sends all of it."""
        self._at = offset
        return offset

    def truncate(self, size: int | None = None) -> int:
        """Drop nothing: what is here was counted."""
        return size or 0

    def write(self, content: bytes) -> int:
        """Take bytes; those that are here and those behind the last piece are dropped."""
        taken = content[max(0, self._next - self._at) : max(0, self.stop - self._at)]
        self._at += len(content)
        while taken:
            piece = self._next // self._file.piece_bytes
            _, stop = self._file.bounds(piece)
            part, taken = taken[: stop - self._next], taken[stop - self._next :]
            self._writer.put(self._next, part)
            self._digest.update(part)
            self._next += len(part)
            self._wrote(len(part))
            if self._next == stop:
                digest, self._digest = self._digest.hexdigest(), hashlib.sha256()
                self._writer.keep(piece, digest)
                self._kept(piece, digest)
        return len(content)


def _hash(stream: BinaryIO, start: int, stop: int) -> str:
    digest = hashlib.sha256()
    stream.seek(start)
    while start < stop and (content := stream.read(min(READ_BYTES, stop - start))):
        digest.update(content)
        start += len(content)
    return digest.hexdigest()
