"""Which computed blocks lie where, and what of them may go: prompts that begin alike share work.

A block is found by a hash of its own and all earlier tokens. A sequence has one contiguous
region, so a hit is a copy of K and V, about a hundredth of computing them; a region that a
finished sequence left, and that the hit covers whole, is taken over instead. What is cached
lies in room that nobody needs: it goes, least recently used first, when somebody does.

All requests of a replica share the cache, so the time to the first token can show a client
whether somebody sent the same beginning before. Where that matters, switch it off.
"""

from __future__ import annotations

import itertools
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import sha256

from serve_app.engine.cache.allocator import BLOCK_TOKENS, Region, RegionAllocator, whole_blocks


@dataclass(slots=True, eq=False)
class Holding:
    """A region whose first blocks are computed.

    Args:
        region: where they lie; changes when its sequence grows.
        chain: the digests of the blocks that may be found here.
    """

    region: Region
    chain: list[bytes] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens in findable blocks."""
        return len(self.chain) * BLOCK_TOKENS


class PrefixCache:
    """Hands out regions and keeps what is computed in them findable.

    Args:
        size: tokens of the pool.
        enabled: False remembers nothing.
    """

    def __init__(self, size: int, *, enabled: bool = True) -> None:
        self.cached_tokens = 0  # in regions that may go
        self._enabled = enabled
        self._regions = RegionAllocator(size)
        self._holders: dict[bytes, dict[Holding, None]] = {}
        # By their last block, least recently used first; none is the beginning of another.
        self._cached: OrderedDict[bytes, Holding] = OrderedDict()

    @property
    def size(self) -> int:
        """Tokens of the pool."""
        return self._regions.size

    @property
    def used_tokens(self) -> int:
        """Tokens in regions of sequences that run."""
        return self._regions.used_tokens - self.cached_tokens

    def find(self, chain: list[bytes]) -> tuple[int, Holding | None]:
        """Return how many tokens of a chain's beginning are computed, and who holds them."""
        known = 0
        for digest in chain:
            # Who holds a block holds all before it, so nothing is known behind a gap.
            if digest not in self._holders:
                break
            known += 1
        if not known:
            return 0, None
        last = chain[known - 1]
        # One that ends here first: it can be taken over.
        holding = self._cached.get(last) or next(reversed(self._holders[last]))
        if self._is_cached(holding):
            # Also when only its beginning is used: what is asked for again should stay.
            self._cached.move_to_end(holding.chain[-1])
        return known * BLOCK_TOKENS, holding

    def place(self, length: int, spare: Holding | None = None) -> Holding | None:
        """Return a new region of at least `length` tokens; None if there is no room.

        Args:
            length: tokens.
            spare: does not go for it.
        """
        region = self._regions.allocate(length)
        if region is None:
            for holding in self._oldest(whole_blocks(length), spare):
                self.drop(holding)
            region = self._regions.allocate(length)
        return None if region is None else Holding(region)

    def take_over(self, holding: Holding, length: int) -> bool:
        """Give a cached holding to a sequence, grown in place; False if that cannot be."""
        if not self._is_cached(holding):
            return False
        # First of all, so that one that cannot grow here is left as it was, to be copied.
        region = self._regions.extend(holding.region, max(length, holding.region.length))
        if region is None:
            return False
        self._uncache(holding)
        holding.region = region
        return True

    def grow(self, holding: Holding, length: int) -> bool:
        """Grow in place or else to a new place, of which the caller copies; False: no room."""
        if grown := self._regions.extend(holding.region, length):
            holding.region = grown
            return True
        if moved := self.place(length):
            self._regions.free(holding.region)
            holding.region = moved.region
            return True
        return False

    def add(self, holding: Holding, digests: list[bytes]) -> None:
        """Make more blocks findable, in order."""
        if self._enabled:
            for digest in digests:
                self._holders.setdefault(digest, {})[holding] = None
            holding.chain += digests

    def release(self, holding: Holding) -> None:
        """Keep a holding's findable blocks until their room is needed; free the rest."""
        # A second holder of the same last block has all of it: two copies would be room wasted.
        if not holding.chain or len(self._holders[holding.chain[-1]]) > 1:
            self.drop(holding)
            return
        for digest in holding.chain[:-1]:
            if digest in self._cached:  # a beginning of this one
                self.drop(self._cached[digest])
        # The end of the region, less than a block or never computed, cannot be found by anybody.
        region = holding.region
        holding.region = Region(region.start, holding.tokens)
        if region.length > holding.tokens:
            rest = Region(holding.region.end, region.length - holding.tokens)
            self._regions.free(rest)
        self._cached[holding.chain[-1]] = holding
        self.cached_tokens += holding.tokens

    def drop(self, holding: Holding) -> None:
        """Forget a holding and free its region."""
        if self._is_cached(holding):
            self._uncache(holding)
        for digest in holding.chain:  # others may hold the same blocks
            holders = self._holders[digest]
            del holders[holding]
            if not holders:
                del self._holders[digest]
        self._regions.free(holding.region)

    def distrust(self, chain: list[bytes]) -> None:
        """Forget all that is cached and begins like a chain."""
        for holding in tuple(self._holders.get(chain[0], ())) if chain else ():
            if self._is_cached(holding):
                self.drop(holding)

    def clear(self) -> None:
        """Forget all that is cached."""
        for holding in tuple(self._cached.values()):
            self.drop(holding)

    def _is_cached(self, holding: Holding) -> bool:
        return bool(holding.chain) and self._cached.get(holding.chain[-1]) is holding

    def _uncache(self, holding: Holding) -> None:
        del self._cached[holding.chain[-1]]
        self.cached_tokens -= holding.tokens

    def _oldest(self, length: int, spare: Holding | None) -> list[Holding]:
        """Choose what has to go for one hole: the newest of it shall be as old as can be."""
        pieces: list[tuple[Region, int, Holding | None]]
        pieces = [(hole, 0, None) for hole in self._regions.holes]
        pieces += [
            (holding.region, age, holding)
            for age, holding in enumerate(self._cached.values(), 1)
            if holding is not spare
        ]
        # Neighbours together may be long enough, so every run of adjacent pieces is looked at.
        pieces.sort(key=lambda piece: piece[0].start)
        least, chosen = len(self._cached) + 1, list[Holding]()
        for first, piece in enumerate(pieces):
            start = end = piece[0].start
            newest, window = 0, list[Holding]()
            for region, age, holding in itertools.islice(pieces, first, None):
                if region.start != end or end - start >= length:
                    break
                end, newest = region.end, max(newest, age)
                window += [holding] if holding else []
            if end - start >= length and newest < least:
                least, chosen = newest, window
        return chosen


def extend_chain(chain: list[bytes], tokens: list[int], blocks: int) -> None:
    """Append digests until `chain` covers the first `blocks` blocks of `tokens`.

    SHA-256 and not Python's hash: whoever could make two prompts collide could read another's.
    """
    for start in range(len(chain) * BLOCK_TOKENS, blocks * BLOCK_TOKENS, BLOCK_TOKENS):
        block = array("q", tokens[start : start + BLOCK_TOKENS]).tobytes()
        chain.append(sha256((chain[-1] if chain else b"") + block).digest())
