"""What a swarm knows of a list of hashes, and of a node that takes by it.

Sets of nodes and sets of pieces are the bits of an int.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.weights.pieces import File, Order, ones


@dataclass(slots=True, eq=False)
class Edition:
    """The hashes of one file's pieces, who stated them, and who has which piece.

    Args:
        file: the file.
        number: of this list; no two have the same.
        whole: nodes that have the file whole.
        origin: the one of them that pieces without a hash are taken from; 0 is the Hub.
        authors: who stated hashes.
        digests: by piece.
        stated: the pieces that have one.
        holders: nodes, for each piece.
        by_count: pieces, for each number of holders.
        claims: pieces on their way from the Hub, and to whom.
        stating: pieces on their way without a hash.
        owner: who takes the file from the Hub.
        moved_at: when the owner was last seen to get on.
        proven_by: for whom the whole file came out right.
        is_doubted: for somebody it did not.
    """

    file: File
    number: int
    whole: int = 0
    origin: int = 0
    authors: set[str] = field(default_factory=set)
    digests: dict[int, str] = field(default_factory=dict)
    stated: int = 0
    holders: list[int] = field(default_factory=list)
    by_count: dict[int, int] = field(default_factory=dict)
    claims: dict[int, str] = field(default_factory=dict)
    stating: int = 0
    owner: str | None = None
    moved_at: float = 0.0
    proven_by: set[str] = field(default_factory=set)
    is_doubted: bool = False

    def __post_init__(self) -> None:
        self.holders = [0] * self.file.pieces
        self.by_count = {0: ones(self.file.pieces)}

    @property
    def is_proven(self) -> bool:
        """Whether somebody who did not state it found it right."""
        return bool(self.proven_by - self.authors)

    def hold(self, piece: int, node: int) -> None:
        """Note that a node has a piece."""
        self._put(piece, self.holders[piece] | node)

    def lose(self, node: int) -> None:
        """Forget all that a node has."""
        self.whole &= ~node
        if self.origin & node:
            self.origin = self.whole & -self.whole
        for piece, held in enumerate(self.holders):
            if held & node:
                self._put(piece, held & ~node)

    def _put(self, piece: int, held: int) -> None:
        before, after, bit = self.holders[piece].bit_count(), held.bit_count(), 1 << piece
        rest = self.by_count[before] & ~bit
        if rest:
            self.by_count[before] = rest
        else:
            del self.by_count[before]
        self.by_count[after] = self.by_count.get(after, 0) | bit
        self.holders[piece] = held


@dataclass(slots=True, eq=False)
class Member:
    """One node that takes, as the swarm knows it.

    Args:
        name: of the node.
        bit: of the node in sets of nodes.
        now: when it was last heard of.
        moved_at: when its bytes last grew.
        chunked: files that it takes from the Hub whole, if nobody has begun with them.
        wants: pieces that it lacks, by file.
        chosen: by which list.
        flying: pieces on their way, by file.
        orders: what it takes from other nodes.
        authored: lists of files that it takes, or took, from the Hub.
        begun: lists by which it takes, and that nobody has proven.
        rejected: numbers of lists that were wrong.
        distrusted: their authors.
        bad: nodes that gave other bytes than were stated.
        sulking: nodes that gave nothing, and until when they are not asked.
        moved: its bytes.
    """

    name: str
    bit: int
    now: float
    moved_at: float
    chunked: frozenset[File]
    wants: dict[File, int] = field(default_factory=dict)
    chosen: dict[File, Edition] = field(default_factory=dict)
    flying: dict[File, int] = field(default_factory=dict)
    orders: dict[tuple[File, int], Order] = field(default_factory=dict)
    authored: list[Edition] = field(default_factory=list)
    begun: set[Edition] = field(default_factory=set)
    rejected: set[int] = field(default_factory=set)
    distrusted: set[str] = field(default_factory=set)
    bad: int = 0
    sulking: dict[int, float] = field(default_factory=dict)
    moved: int = -1

    def avoided(self) -> int:
        """Return the nodes that it does not take from."""
        avoided = self.bad
        for bit in self.sulking:
            avoided |= bit
        return avoided
