"""Steps whose logits depend on a sequence alone: every token is a row of a batch of one size.

What a library computes for a row may depend on how many rows there are, because it chooses its
kernels by shape. Here no shape ever changes: a step is cut into batches of single tokens, each
with its own query, and the last batch is filled up with padding. Attention of a single query
reads its own keys only, so its shape is the sequence's own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from serve_app.engine.cache.allocator import Region
from serve_app.engine.cache.prefix_cache import Holding
from serve_app.engine.model.runner import Forward
from serve_app.engine.sequence import Move, Row, SamplingPlan, Sequence

GREEDY = SamplingPlan(temperature=0, top_p=1, top_k=0, seed=0, stop_token_ids=frozenset())


class FixedForward:
    """See `Forward`.

    Args:
        forward: computes the batches.
        rows: of every batch.
        scratch: the first of `rows` places of the cache for padding, behind all others.
    """

    def __init__(self, forward: Forward, rows: int, scratch: int) -> None:
        self._forward = forward
        self._padding = [_padding(scratch + row) for row in range(rows)]

    def move(self, moves: tuple[Move, ...]) -> None:
        """See `Forward.move`."""
        self._forward.move(moves)

    def logits(self, rows: list[Row]) -> torch.Tensor:
        """See `Forward.logits`."""
        tokens = [token for row in rows for token in _tokens(row)]
        size = len(self._padding)
        return torch.cat(
            [self._batch(tokens[first : first + size]) for first in range(0, len(tokens), size)]
        )

    def _batch(self, tokens: list[tuple[Row, bool]]) -> torch.Tensor:
        """Compute one batch; returns the logits that are asked for, a copy."""
        rows = [row for row, _ in tokens]
        logits = self._forward.logits(rows + self._padding[len(rows) :])
        return logits[[place for place, (_, kept) in enumerate(tokens) if kept]]


def _tokens(row: Row) -> Iterator[tuple[Row, bool]]:
    """Yield a row's tokens as rows of one, and whether their logits are asked for."""
    known = row.count - len(row.drafts)
    for at in range(row.count):
        drafts = row.drafts[at - known : at - known + 1] if at >= known else ()
        yield Row(row.sequence, row.start + at, 1, 1, drafts), at >= row.count - row.kept


def _padding(place: int) -> Row:
    """Return a row that decodes a token nobody asked for, in a place nobody else has."""
    sequence = Sequence(-1 - place, [0], 1, 1, GREEDY, holding=Holding(Region(place, 1)))
    return Row(sequence, 0, 1, 1)
