"""The places of sequences in the KV cache: found, copied from others, grown, given back."""

from __future__ import annotations

from serve_app.engine.cache.allocator import BLOCK_TOKENS
from serve_app.engine.cache.prefix_cache import Holding, PrefixCache
from serve_app.engine.sequence import Move, Sequence


class Places:
    """Gives sequences their regions; the copies that it takes go to the end of `moves`.

    Args:
        cache: of regions, and of what others may find in them.
    """

    def __init__(self, cache: PrefixCache) -> None:
        self._cache = cache

    def take(self, sequence: Sequence, wanted: int, moves: list[Move]) -> bool:
        """Find a region of `wanted` tokens, with what is known of the beginning in it.

        Returns:
            Whether there was one; `holding` and `computed` of the sequence are set then.
        """
        source, known = self._known(sequence)
        if source is not None:
            # Best: nobody runs in that region and all of it is wanted, so nothing is copied.
            if known == source.tokens and self._cache.take_over(source, wanted):
                sequence.holding, sequence.computed = source, known
                return True
            # `spare`: what is about to be copied must not make room for its own copy.
            if holding := self._cache.place(wanted, spare=source):
                moves.append(Move(source.region.start, holding.region.start, known))
                sequence.holding, sequence.computed = holding, known
                return True
        # Without the copy there may be room, at the cost of what was found: better than waiting.
        sequence.holding = self._cache.place(wanted)
        return sequence.holding is not None

    def missing(self, sequence: Sequence) -> int:
        """Return the tokens that a waiting sequence would have to compute if it began now."""
        return len(sequence.tokens) - self._known(sequence)[1]

    def publish(self, sequence: Sequence) -> None:
        """Let others find the blocks that are computed."""
        holding = sequence.holding
        known = min(sequence.computed, len(sequence.tokens))  # guessed tokens do not count
        if holding is not None and known - holding.tokens >= BLOCK_TOKENS:
            done = len(holding.chain)
            self._cache.add(holding, sequence.digests(known)[done:])

    def grow(self, sequence: Sequence, length: int, moves: list[Move]) -> bool:
        """Make a region longer, in place or elsewhere; returns whether that was possible."""
        holding = sequence.holding
        length = min(sequence.limit, length)
        if holding is None or length < len(sequence.tokens):
            return False
        before = holding.region.start
        if not self._cache.grow(holding, length):
            return False
        if holding.region.start != before:
            moves.append(Move(before, holding.region.start, sequence.computed))
        return True

    def release(self, sequence: Sequence) -> None:
        """Give a region back; what is known of it stays until somebody needs the room."""
        if sequence.holding is not None:
            self._cache.release(sequence.holding)
            sequence.holding = None

    def _known(self, sequence: Sequence) -> tuple[Holding | None, int]:
        """Return who holds the longest beginning, and how many tokens of it are computed."""
        most = len(sequence.tokens) - 1  # one must be computed to have logits
        if not sequence.reuse:
            return None, 0
        chain = sequence.digests(most)
        known, source = self._cache.find(chain)
        # The completions of one request share the prompt before its blocks are published, also the
        # part of it that fills no whole block.
        parent = sequence.parent
        if parent is not None and parent.holding is not None:
            shared = min(parent.computed, sequence.prompt_tokens, most)
            if shared > known:
                return parent.holding, shared
        return source, known
