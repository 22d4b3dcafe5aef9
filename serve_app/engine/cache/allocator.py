"""Contiguous places in a flat pool of tokens: first fit, neighbours merged when freed.

Pure bookkeeping; no tensor is touched here. A pool has tens to a few hundred regions, so
plain lists are faster than anything cleverer.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

# Regions start at multiples of this and are whole multiples long: a forward may keep its
# cache in blocks (the native one does), and the prefix cache compares whole blocks.
BLOCK_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Region:
    """Tokens `start` to `start + length - 1` of the pool; length >= 1."""

    start: int
    length: int

    @property
    def end(self) -> int:
        """The first token after the region."""
        return self.start + self.length


class RegionAllocator:
    """Hands out regions of whole blocks of a pool; no two overlap.

    Args:
        size: tokens of the pool, rounded down to whole blocks.
    """

    def __init__(self, size: int) -> None:
        self.size = size - size % BLOCK_TOKENS
        self.free_tokens = self.size  # in no region, perhaps scattered
        self._free = [Region(0, self.size)]  # sorted by start, never adjacent

    @property
    def used_tokens(self) -> int:
        """Tokens in regions."""
        return self.size - self.free_tokens

    @property
    def holes(self) -> tuple[Region, ...]:
        """What is in no region, by start, never adjacent."""
        return tuple(self._free)

    def allocate(self, length: int) -> Region | None:
        """Return the lowest region of at least `length` tokens; None if no hole is long enough."""
        length = whole_blocks(length)
        for index, hole in enumerate(self._free):
            if hole.length >= length:
                self._take(index, length)
                return Region(hole.start, length)
        return None

    def extend(self, region: Region, length: int) -> Region | None:
        """Grow a region in place to at least `length` tokens; None when there is no room."""
        length = whole_blocks(length)
        more = length - region.length
        index = bisect.bisect_left(self._free, region.end, key=_start)
        if index < len(self._free):
            hole = self._free[index]
            if hole.start == region.end and hole.length >= more:
                self._take(index, more)
                return Region(region.start, length)
        return None

    def free(self, region: Region) -> None:
        """Give a region back.

        Raises:
            ValueError: part of it is free already; the bookkeeping of the caller is broken.
        """
        index = bisect.bisect_left(self._free, region.start, key=_start)
        before = self._free[index - 1] if index > 0 else None
        after = self._free[index] if index < len(self._free) else None
        if (before and before.end > region.start) or (after and region.end > after.start):
            raise ValueError(f"{region} is free already")
        # Merged with its neighbours at once: holes that touch would each be too short for what
        # fits both.
        start, end = region.start, region.end
        first, last = index, index
        if before and before.end == start:
            start, first = before.start, index - 1
        if after and after.start == end:
            end, last = after.end, index + 1
        self._free[first:last] = [Region(start, end - start)]
        self.free_tokens += region.length

    def _take(self, index: int, length: int) -> None:
        hole = self._free[index]
        rest = hole.length - length
        self._free[index : index + 1] = [Region(hole.start + length, rest)] if rest else []
        self.free_tokens -= length


def whole_blocks(tokens: int) -> int:
    """Round up to whole blocks."""
    return tokens + -tokens % BLOCK_TOKENS


def _start(region: Region) -> int:
    return region.start
