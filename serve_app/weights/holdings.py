"""Who has which piece, who takes which, and by whose word: what a swarm decides upon.

Sets of nodes and sets of pieces are the bits of an int.
"""

from __future__ import annotations

import random

from serve_app.weights.editions import Edition, Member
from serve_app.weights.pieces import Failed, File, Got, Order, lowest, ones

GIVES = 8  # pieces at a time that one node gives
SULK_S = 30.0  # for which a node that gave nothing is not asked again by the same


class Holdings:
    """The state of one swarm.

    Args:
        seed: of the choices among equals.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)  # noqa: S311
        self._bits: dict[str, int] = {}
        self._names: list[str] = []
        self._members: dict[str, Member] = {}
        self._gives: dict[str, int] = {}  # pieces that a node is asked for
        self._free = 0  # nodes that could give one more
        self._lost = 0
        self._seeds = 0  # nodes that have all files, as they said
        self._whole: dict[File, int] = {}
        self._editions: dict[File, list[Edition]] = {}
        self._numbered: dict[int, Edition] = {}
        self._last_number = self._random.getrandbits(40)  # no other swarm has the same
        self._open: set[Edition] = set()  # of which pieces have to come from the Hub
        self._wanting: dict[File, int] = {}  # how many nodes lack a file
        self._right: dict[str, int] = {}  # files by an author that came out right

    # Lists of hashes.

    def _edition(self, member: Member, file: File) -> Edition | None:
        """Return the list that a node takes a file by; None if there is none that it believes."""
        if (chosen := member.chosen.get(file)) is not None:
            return chosen
        believed = [
            edition
            for edition in self._editions.get(file, ())
            if edition.number not in member.rejected and not edition.authors & member.distrusted
        ]
        if believed:
            chosen = max(believed, key=lambda edition: (edition.is_proven, -edition.number))
            member.chosen[file] = chosen
        elif self._who_has(member, file):
            chosen = self._new_edition(member, file)
        return chosen

    def _new_edition(self, member: Member, file: File) -> Edition:
        self._last_number += 1
        edition = Edition(file, self._last_number, self._who_has(member, file))
        if edition.whole:
            self._take_origin(edition, self._any(edition.whole))
        self._numbered[edition.number] = edition
        self._editions.setdefault(file, []).append(edition)
        member.chosen[file] = edition
        return edition

    def _take_origin(self, edition: Edition, index: int) -> None:
        edition.origin = 1 << index
        edition.authors.add(self._names[index])

    def _who_has(self, member: Member, file: File) -> int:
        """Return the nodes that say they have a file whole, and that a node believes."""
        found = (self._seeds | self._whole.get(file, 0)) & ~member.avoided()
        for name in member.distrusted:
            found &= ~self._bits.get(name, 0)
        return found

    # What is reported.

    def _got(self, member: Member, got: Got) -> None:
        file, piece, name = got.file, got.piece, member.name
        edition = self._numbered.get(got.edition)
        if edition is None or edition.file != file or not 0 <= piece < file.pieces:
            return
        order = member.orders.get((file, piece))
        if order is not None and order.edition == got.edition:
            self._landed(member, order)
        self._unfly(member, edition, piece)
        if member.chosen.get(file) is not edition or file not in member.wants:
            return
        if piece not in edition.digests:
            edition.digests[piece] = got.digest
            edition.stated |= 1 << piece
            edition.authors.add(got.source or name)
        elif edition.digests[piece] != got.digest:
            if got.source is None:  # the Hub itself says so
                self._refuted(member, file, edition.number)
            return
        if edition.owner == name:
            edition.moved_at = member.now
        member.wants[file] &= ~(1 << piece)
        edition.hold(piece, member.bit)
        self._close(edition)

    def _failed(self, member: Member, failed: Failed) -> None:
        order = failed.order
        if (edition := self._numbered.get(order.edition)) is None:
            return
        for piece in range(
            max(0, order.first), min(order.first + order.pieces, edition.file.pieces)
        ):
            self._unfly(member, edition, piece)
        if order.source is None:
            if member.name not in edition.claims.values():
                self._disown(edition, member.name)
            return
        if member.orders.get((order.file, order.first)) == order:
            self._landed(member, order)
        source = self._bits.get(order.source, 0)
        if failed.is_wrong:
            member.bad |= source
            self._distrust(member, {order.source})
        else:
            member.sulking[source] = member.now + SULK_S

    def _proven(self, member: Member, file: File) -> None:
        if file not in member.wants:
            return
        edition = member.chosen.pop(file, None)
        if edition is not None:
            self._void(member, edition)
            was_proven = edition.is_proven
            edition.proven_by.add(member.name)
            if edition.is_proven and not was_proven:
                for author in edition.authors:
                    self._right[author] = self._right.get(author, 0) + 1
            self._add_whole(edition, member.bit)
            self._close(edition)
        del member.wants[file]
        self._wanting[file] -= 1
        self._whole[file] = self._whole.get(file, 0) | member.bit

    def _refuted(self, member: Member, file: File, number: int) -> None:
        """Drop a list for a node, with its authors and all that it takes by lists of theirs."""
        wrong = member.chosen.get(file)
        if wrong is None or wrong.number != number or file not in member.wants:
            return
        wrong.is_doubted |= member.name not in wrong.authors
        member.bad = 0  # who was blamed by such a list may be right
        self._drop(member, wrong)
        self._distrust(member, wrong.authors - {member.name})

    def _distrust(self, member: Member, authors: set[str]) -> None:
        member.distrusted |= authors
        for edition in list(member.chosen.values()):
            if member.wants.get(edition.file) and edition.authors & authors:
                self._drop(member, edition)

    def _drop(self, member: Member, edition: Edition) -> None:
        self._void(member, edition)
        edition.lose(member.bit)
        del member.chosen[edition.file]
        member.rejected.add(edition.number)
        member.wants[edition.file] = ones(edition.file.pieces)

    def _void(self, member: Member, edition: Edition) -> None:
        """Let nothing of a file be on its way to a node any more."""
        member.begun.discard(edition)
        for order in [each for each in member.orders.values() if each.edition == edition.number]:
            self._landed(member, order)
        member.flying.pop(edition.file, None)
        self._disown(edition, member.name)

    # What is on its way.

    def _depart(self, member: Member, order: Order) -> None:
        edition, bits = self._numbered[order.edition], ones(order.pieces) << order.first
        member.flying[order.file] = member.flying.get(order.file, 0) | bits
        if order.source is None:
            pieces = range(order.first, order.first + order.pieces)
            edition.claims |= dict.fromkeys(pieces, member.name)
            return
        member.orders[order.file, order.first] = order
        member.begun.add(edition)
        if order.digest is None:
            edition.stating |= bits
        self._gives[order.source] += 1
        if self._gives[order.source] >= GIVES:
            self._free &= ~self._bits[order.source]

    def _landed(self, member: Member, order: Order) -> None:
        del member.orders[order.file, order.first]
        if order.digest is None:
            self._numbered[order.edition].stating &= ~(1 << order.first)
        source = str(order.source)
        self._gives[source] -= 1
        if self._gives[source] < GIVES:
            self._free |= self._bits[source] & ~self._lost

    def _unfly(self, member: Member, edition: Edition, piece: int) -> None:
        if member.chosen.get(edition.file) is edition:
            member.flying[edition.file] = member.flying.get(edition.file, 0) & ~(1 << piece)
        if edition.claims.get(piece) == member.name:
            del edition.claims[piece]

    def _unclaim(self, member: Member) -> bool:
        """Let others take from the Hub what a node was to take; False if that was nothing."""
        own = [edition for edition in self._open if edition.owner == member.name]
        for edition in own:
            for piece in [piece for piece, by in edition.claims.items() if by == member.name]:
                self._unfly(member, edition, piece)
            self._disown(edition, member.name)
        return bool(own)

    def _disown(self, edition: Edition, name: str) -> None:
        edition.claims = {piece: by for piece, by in edition.claims.items() if by != name}
        if edition.owner == name:
            edition.owner = None
            self._open.discard(edition)

    def _close(self, edition: Edition) -> None:
        if not edition.claims and (edition.origin or 0 not in edition.by_count):
            self._open.discard(edition)

    def _add_whole(self, edition: Edition, bit: int) -> None:
        edition.whole |= bit
        # Who says that it has a file gets no say in a list that somebody else has begun.
        if not (edition.origin or edition.stated or edition.claims):
            self._take_origin(edition, lowest(bit))

    def _bit(self, name: str) -> int:
        if name not in self._bits:
            self._bits[name] = 1 << len(self._names)
            self._free |= self._bits[name]
            self._names.append(name)
            self._gives[name] = 0
        return self._bits[name]

    def _any(self, bits: int) -> int:
        """Return a member of a set that is not empty, by chance."""
        least = self._random.randrange(bits.bit_length())
        return least + lowest(bits >> least)
