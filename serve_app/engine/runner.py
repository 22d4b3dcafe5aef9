"""One step: rows in the pool's order through the forward, then a token for each that samples."""

from __future__ import annotations

from typing import Protocol

import torch

from serve_app.engine import sampling
from serve_app.engine.sequence import Move, Row, StepPlan


class Forward(Protocol):
    """The model with its KV cache; used by one thread."""

    def move(self, moves: tuple[Move, ...]) -> None:
        """Copy K and V within the cache, in order."""
        ...

    def logits(self, rows: list[Row]) -> torch.Tensor:
        """Compute rows as one batch and keep their K and V.

        Args:
            rows: at least one, in the order of their places in the cache.

        Returns:
            Of each row's last `kept` tokens, row by row, (sum of kept, vocabulary).
        """
        ...


class Runner:
    """Computes plans; used by one thread.

    Args:
        forward: the model.
    """

    def __init__(self, forward: Forward) -> None:
        self._threads = torch.get_num_threads()
        self._forward = forward

    def enter_thread(self) -> None:
        """Give the calling thread the number of threads that was set when this was made."""
        torch.set_num_threads(self._threads)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> list[tuple[Row, int | None]]:
        """Compute a plan.

        Returns:
            Each row that samples with its token; None where its logits are not finite.
        """
        self._forward.move(plan.moves)
        # In the order of the pool, so that a backend may read starts as cumulated lengths.
        rows = sorted(plan.rows, key=_place)
        logits = self._forward.logits(rows)
        sampled = [row for row in rows if row.kept]
        if not sampled:
            return []
        tokens = sampling.sample(
            logits,
            [row.sequence.sampling for row in sampled],
            [row.sequence.generated for row in sampled],
        )
        return list(zip(sampled, tokens, strict=True))


def _place(row: Row) -> int:
    return row.place
