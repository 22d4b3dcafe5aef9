"""Who takes which piece from whom: the decisions alone, without clock, network or Ray.

Whoever takes a piece from the Hub states its hash, and so a file's pieces get a list of hashes
with an author. The others take pieces that match the list, the rarest first, and give them on
before the file is whole. The file's own hash decides in the end: a node for which it does not
come out drops the list and its authors, and takes the file again by another list. Each node
decides that for itself, so a false complaint costs nobody but who complains; and it takes few
files at a time by an author of whom none has come out right yet.

Nothing in here needs to outlive the process: whoever takes part says again what it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import itemgetter

from serve_app.weights.editions import Edition, Member
from serve_app.weights.holdings import Holdings
from serve_app.weights.pieces import Answer, File, Got, Order, Report, lowest, ones, require_bounded

SPAN = 8  # pieces of one request to the Hub
OPEN_FILES = 8  # at a time from the Hub, by all nodes, so that files become whole one by one
UNPROVEN_FILES = 1  # at a time by one author, and one more for each that came out right
SEED_FILES = 8  # likewise by a node that had the whole commit before
SMALL_BYTES = 1 << 30  # all that an author has unproven may have so much, however many files
SILENT_S = 15.0  # without a report, after which what a node was to do is for others
STALL_S = 120.0  # likewise without one more byte
CLAIM_S = 300.0  # for the next piece of a file that a node takes from the Hub, of CLAIM_PIECES
CLAIM_PIECES = 64  # or for all of more, which may come at once in the end
PENALTY_S = 30.0  # for which a node that let a claim lapse gets no other, each time more
TICK_S = 1.0
WAIT_S = 0.1  # between two reports of a node
WAIT_S_EACH = 0.001  # and with many nodes so much for each: 1000 reports a second in all
LOOKS = 4  # at pieces of the same rarity, for one with a source that is free


class Unknown(Exception):
    """Whoever reports has to join first."""


class Swarm(Holdings):
    """One commit, as nodes share it.

    Args:
        silent_s: see `SILENT_S`.
        seed: of the choices among equals.
    """

    def __init__(self, *, silent_s: float = SILENT_S, seed: int | None = None) -> None:
        super().__init__(seed)
        self._silent_s = silent_s
        self._lapses: dict[str, int] = {}
        self._penalties: dict[str, float] = {}
        self._ticked = 0.0

    @property
    def nodes(self) -> list[str]:
        """All that were ever here and are not lost."""
        return [name for name, bit in self._bits.items() if not bit & self._lost]

    def seed(self, name: str) -> None:
        """Count a node as one that has all files."""
        bit = self._bit(name)
        if not (self._seeds | self._lost) & bit and name not in self._members:
            self._seeds |= bit
            for edition in self._numbered.values():
                self._add_whole(edition, bit)

    def join(
        self,
        name: str,
        files: Iterable[File],
        *,
        now: float,
        chunked: Iterable[File] = (),
        whole: Iterable[File] = (),
        here: Mapping[File, Mapping[int, str]] | None = None,
    ) -> dict[File, tuple[int, set[int]]]:
        """Take a node in, which may have been here before.

        Args:
            name: of the node.
            files: that it lacks, each of one byte at least.
            now: seconds by any clock that does not go back.
            chunked: those of them that it takes whole from the Hub if it can.
            whole: files that it has, as the Hub lists them.
            here: pieces of the lacking ones that it has, with their hashes.

        Returns:
            For files of which it has pieces, the list that these belong to, and which of them
            are as that list says; the others count for nothing.

        Raises:
            ValueError: see `require_bounded`; nothing has changed then.
        """
        files, whole = tuple(files), tuple(whole)
        require_bounded((*files, *whole))
        self.lose(name)
        bit = self._bit(name)
        self._lost &= ~bit
        self._free |= bit
        member = Member(name, bit, now, now, frozenset(chunked))
        self._members[name] = member
        editions = {}
        for file in sorted(files, key=lambda file: (-file.size, file.etag)):
            member.wants[file] = ones(file.pieces)
            self._wanting[file] = self._wanting.get(file, 0) + 1
            pieces = (here or {}).get(file)
            if pieces:
                edition = self._edition(member, file) or self._new_edition(member, file)
                right = {
                    piece
                    for piece, digest in pieces.items()
                    if edition.digests.get(piece, digest) == digest
                }
                for piece in right:
                    self._got(member, Got(file, piece, pieces[piece], None, edition.number))
                editions[file] = (edition.number, right)
        for file in whole:
            self._whole[file] = self._whole.get(file, 0) | bit
            for edition in self._editions.get(file, ()):
                self._add_whole(edition, bit)
        return editions

    def leave(self, name: str) -> None:
        """Let a node go; what it has may still be asked for."""
        member = self._members.pop(name, None)
        if member is None:
            return
        for order in list(member.orders.values()):
            self._landed(member, order)
        for file in member.wants:
            self._wanting[file] -= 1
        self._unclaim(member)

    def lose(self, name: str) -> None:
        """Forget a node and all that it has."""
        self.leave(name)
        if (bit := self._bits.get(name)) is None:
            return
        self._lost |= bit
        self._seeds &= ~bit
        self._free &= ~bit
        for file in self._whole:
            self._whole[file] &= ~bit
        for edition in self._numbered.values():
            edition.lose(bit)

    def exchange(self, name: str, report: Report, *, now: float) -> Answer:
        """Take a node's report and give it its next orders.

        Args:
            name: of the node.
            report: of what happened since its last one.
            now: by the clock of `join`.

        Raises:
            Unknown: it has to join first.
        """
        member = self._members.get(name)
        if member is None:
            raise Unknown(name)
        self._hear(member, report, now)
        if now - self._ticked >= TICK_S:
            self._ticked = now
            self._tick(now)
        member.sulking = {bit: end for bit, end in member.sulking.items() if end > now}
        orders = self._from_hub(member, report.streams) + self._from_nodes(member, report.slots)
        return Answer(orders, max(WAIT_S, WAIT_S_EACH * len(self._members)))

    def _hear(self, member: Member, report: Report, now: float) -> None:
        member.now = now
        if report.moved != member.moved:
            member.moved, member.moved_at = report.moved, now
        for failed in report.failed:
            self._failed(member, failed)
        for got in report.got:
            self._got(member, got)
        for file, edition in report.refuted:
            self._refuted(member, file, edition)
        for file in report.proven:
            self._proven(member, file)

    # What to take from nodes.

    def _from_nodes(self, member: Member, slots: int) -> list[Order]:
        orders: list[Order] = []
        usable = self._free & ~member.bit & ~member.avoided()
        for edition, pieces in self._rarest(member, slots) if slots > 0 and usable else ():
            rest = pieces if self._believes(member, edition) else 0
            while len(orders) < slots and (order := self._ready(member, edition, rest, usable)):
                self._depart(member, order)
                orders.append(order)
                rest &= ~(1 << order.first)
                usable &= self._free
        return orders

    def _rarest(self, member: Member, slots: int) -> list[tuple[Edition, int]]:
        """Return the pieces that a node could take, those that the fewest have before others."""
        found: list[tuple[int, Edition, int]] = []
        for file, wants in member.wants.items():
            lacking = wants & ~member.flying.get(file, 0)
            edition = self._edition(member, file) if lacking else None
            if edition is None:
                continue
            lacking &= ~edition.stating
            enough, whole = slots, edition.whole.bit_count()
            for count in sorted(edition.by_count):
                ready = edition.by_count[count] & lacking
                if not count:  # from nobody, or from who has all of it
                    ready &= -1 if edition.origin else edition.stated if whole else 0
                if ready:
                    found.append((count + whole, edition, ready))
                    enough -= ready.bit_count()
                if enough <= 0:
                    break
        return [(edition, ready) for _, edition, ready in sorted(found, key=itemgetter(0))]

    def _ready(self, member: Member, edition: Edition, ready: int, usable: int) -> Order | None:
        for _ in range(min(LOOKS, ready.bit_count())):
            piece = self._any(ready)
            ready &= ~(1 << piece)
            digest = edition.digests.get(piece)
            sources = edition.holders[piece] | edition.whole
            if digest is None and edition.origin & ~member.avoided():
                sources = edition.origin
            if sources & usable:
                source = self._names[self._any(sources & usable)]
                return Order(edition.file, piece, 1, source, digest, edition.number)
        return None

    def _believes(self, member: Member, edition: Edition) -> bool:
        """Return whether a node takes by a list: its author may have few that are unproven."""
        if edition in member.begun or edition.is_proven:
            return True
        begun = [each for each in member.begun if not each.is_proven]
        return all(
            self._may_have(author, edition.file, [each for each in begun if author in each.authors])
            for author in edition.authors - {member.name}
        )

    def _may_have(self, author: str, file: File, unproven: list[Edition]) -> bool:
        size = file.size + sum(each.file.size for each in unproven)
        is_seed = self._seeds & self._bits.get(author, 0)  # whose lies cost the Hub nothing
        allowed = (SEED_FILES if is_seed else UNPROVEN_FILES) + self._right.get(author, 0)
        return len(unproven) < allowed or size <= SMALL_BYTES

    # What to take from the Hub.

    def _from_hub(self, member: Member, streams: int) -> list[Order]:
        orders: list[Order] = []
        if member.now < self._penalties.get(member.name, 0.0):
            return orders
        for file in member.wants:
            while len(orders) < streams and (order := self._span(member, file)):
                self._depart(member, order)
                orders.append(order)
        return orders

    def _span(self, member: Member, file: File) -> Order | None:
        """Return an order for pieces that nobody has: by the file's owner, or a new one."""
        edition = self._opened(member, file)
        lacking = 0 if edition is None else self._unheld(member, edition)
        if edition is None or not lacking:
            return None
        first, limit, count = lowest(lacking), SPAN, 1
        if first in edition.digests:
            limit = 1  # only this node lacks it, and the list may be wrong
        if file in member.chunked and lacking == ones(file.pieces):
            limit = file.pieces
        while count < limit and lacking >> (first + count) & 1:
            count += 1
        if edition.owner != member.name or not edition.claims:
            edition.owner, edition.moved_at = member.name, member.now
        self._open.add(edition)
        if edition not in member.authored:
            member.authored.append(edition)
        return Order(file, first, count, None, None, edition.number)

    def _opened(self, member: Member, file: File) -> Edition | None:
        """Return the list by which a node may take a file from the Hub, if it may."""
        edition = self._edition(member, file)
        if edition is not None and edition in self._open:
            return edition if edition.owner in (None, member.name) else None
        if edition is not None and not self._unheld(member, edition):
            return None
        if not self._may_open(member, file):
            return None
        return edition or self._new_edition(member, file)

    def _unheld(self, member: Member, edition: Edition) -> int:
        """Return the pieces that a node lacks, nobody could give it, and nobody takes."""
        lacking = member.wants[edition.file] & ~member.flying.get(edition.file, 0)
        avoided = member.avoided()
        if edition.whole & ~avoided:
            lacking &= 0 if edition.origin else ~edition.stated
        for piece in edition.claims:
            lacking &= ~(1 << piece)
        if not avoided:
            return lacking & edition.by_count.get(0, 0)
        few, limit = 0, avoided.bit_count()  # held by so few that all of these may be avoided
        for count, pieces in edition.by_count.items():
            few |= pieces if count <= limit else 0
        rest, lacking = lacking & few, 0
        while rest:
            piece = lowest(rest)
            rest &= ~(1 << piece)
            if not edition.holders[piece] & ~avoided:
                lacking |= 1 << piece
        return lacking

    def _may_open(self, member: Member, file: File) -> bool:
        if not self._open or len(self._open) >= OPEN_FILES:
            return not self._open
        unproven = [
            each
            for each in member.authored
            if not each.is_proven
            and (each.is_doubted or self._wanting[each.file] > int(each.file in member.wants))
        ]
        return self._may_have(member.name, file, unproven)

    def _tick(self, now: float) -> None:
        """Give to others what nodes do that are silent or stand still."""
        for member in list(self._members.values()):
            is_silent = now - member.now > self._silent_s
            if is_silent or now - member.moved_at > STALL_S or self._is_late(member, now):
                self._lapse(member, now)
            if is_silent:
                self.leave(member.name)

    def _is_late(self, member: Member, now: float) -> bool:
        return any(
            now - edition.moved_at > CLAIM_S * max(1.0, len(edition.claims) / CLAIM_PIECES)
            for edition in self._open
            if edition.owner == member.name
        )

    def _lapse(self, member: Member, now: float) -> None:
        if self._unclaim(member):
            lapses = self._lapses[member.name] = self._lapses.get(member.name, 0) + 1
            self._penalties[member.name] = now + PENALTY_S * lapses
