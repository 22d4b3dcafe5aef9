"""A file cut into pieces, and what a swarm and its nodes say to each other about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

PIECE_BYTES = 64 << 20
MAX_PIECES = 1 << 18  # of what one node lacks and has of a commit: 16 TiB in pieces of 64 MiB


class File(NamedTuple):
    """One content of a commit, cut into pieces; equal for all who have the Hub's listing."""

    etag: str
    size: int
    piece_bytes: int = PIECE_BYTES

    @property
    def pieces(self) -> int:
        """How many there are."""
        return -(-self.size // self.piece_bytes)

    def bounds(self, first: int, count: int = 1) -> tuple[int, int]:
        """Return the first byte of some pieces and the one behind their last."""
        return first * self.piece_bytes, min(self.size, (first + count) * self.piece_bytes)


class Order(NamedTuple):
    """Pieces to take.

    Args:
        file: of which.
        first: the first piece.
        pieces: how many; 1 from a node.
        source: a node's name; None is the Hub.
        digest: what the piece must have; None: whoever takes it states it.
        edition: the number of the list that it belongs to; what a node has by another is void.
    """

    file: File
    first: int
    pieces: int
    source: str | None
    digest: str | None
    edition: int


class Got(NamedTuple):
    """A piece came from a node or, without `source`, from the Hub."""

    file: File
    piece: int
    digest: str
    source: str | None
    edition: int


class Failed(NamedTuple):
    """An order came to nothing; `is_wrong` if other bytes came than were stated."""

    order: Order
    is_wrong: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What a node says since its last report.

    Args:
        moved: a number that grows as bytes come.
        slots: pieces that it could begin to take from nodes.
        streams: requests to the Hub that it could begin.
        got: pieces that are here, as their list says or as the Hub sent them.
        failed: orders that came to nothing.
        proven: files whose bytes have the Hub's hash.
        refuted: files whose pieces were all here, by the list of this number, and whose bytes
            have another hash; they are gone.
    """

    moved: int = 0
    slots: int = 0
    streams: int = 0
    got: Sequence[Got] = ()
    failed: Sequence[Failed] = ()
    proven: Sequence[File] = ()
    refuted: Sequence[tuple[File, int]] = ()


class Answer(NamedTuple):
    """What a node is to do next, and after how many seconds it reports again."""

    orders: list[Order]
    wait_s: float


def require_bounded(files: Sequence[File]) -> None:
    """Refuse files that would take more memory than any commit does.

    Raises:
        ValueError: too many pieces, or a size that is none.
    """
    if any(file.size < 1 or file.piece_bytes < 1 for file in files):
        raise ValueError("a file and its pieces have at least one byte")
    if sum(file.pieces for file in files) > MAX_PIECES:
        raise ValueError(f"more than {MAX_PIECES} pieces")


def ones(count: int) -> int:
    """Return the set of the first pieces."""
    return (1 << count) - 1


def lowest(bits: int) -> int:
    """Return the first of a set that is not empty."""
    return (bits & -bits).bit_length() - 1
