"""A long prompt's probabilities in parts, each of which stops an event loop for milliseconds.

8,192 tokens with 20 alternatives are 12 MB of a frame, and reading it takes a third of a second in
one call, during which an ingress carries nobody else's tokens; a thread would hold the interpreter.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from serve_app.protocol import TokenDelta, TokenLogprobs

PROBABILITIES = 4096  # of one part; some 7 ms to read


async def in_parts(deltas: AsyncGenerator[TokenDelta, None]) -> AsyncGenerator[TokenDelta, None]:
    """Pass deltas on; before one with many probabilities of the prompt come most of these.

    Closing this closes `deltas`.
    """
    async with aclosing(deltas):
        async for delta in deltas:
            scores = delta.prompt_logprobs
            count = PROBABILITIES // (1 + max((len(each.top) for each in scores), default=0)) or 1
            begin = 0
            for end in range(count, len(scores), count):
                yield _part(delta, scores[begin:end])
                begin = end
                await asyncio.sleep(0)  # what is put into one turn of the loop is one frame
            yield replace(delta, prompt_logprobs=scores[begin:]) if begin else delta


def _part(delta: TokenDelta, scores: tuple[TokenLogprobs, ...]) -> TokenDelta:
    return TokenDelta("", (), delta.usage, index=delta.index, prompt_logprobs=scores)


class Joining:
    """Puts the parts of one request's deltas together again."""

    def __init__(self) -> None:
        self._scores: list[TokenLogprobs] = []

    def whole(self, delta: TokenDelta) -> TokenDelta | None:
        """Return the delta that `in_parts` was given; None for a part that comes before it."""
        if not (delta.text or delta.token_ids or delta.reasoning or delta.finish_reason):
            self._scores += delta.prompt_logprobs
            return None
        if not self._scores:
            return delta
        scores, self._scores = (*self._scores, *delta.prompt_logprobs), []
        return replace(delta, prompt_logprobs=scores)
