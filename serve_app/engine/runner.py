"""One step's forward: rows packed into one batch, logits where a token is sampled."""

from __future__ import annotations

from typing import Any

import torch

from serve_app.engine import sampling
from serve_app.engine.attention.step import Backend, Scoring, Span
from serve_app.engine.kv_cache import KVCache
from serve_app.engine.sequence import Row, StepPlan


class Runner:
    """Owns the model and its cache; used by one thread.

    Args:
        model: a transformers causal LM that attends through our interface.
        cache: its KV cache.
        backend: how to attend.
        device: where token ids go in.
    """

    def __init__(self, model: Any, cache: KVCache, backend: Backend, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._model = model
        self._cache = cache
        self._backend = backend
        self._device = device

    def enter_thread(self) -> None:
        """Give the calling thread the number of threads that was set when this was made."""
        torch.set_num_threads(self._threads)

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> list[tuple[Row, int | None]]:
        """Compute a plan.

        Returns:
            Each row that samples with its token; None where its logits are not finite.
        """
        self._cache.move(plan.moves)
        # In the order of the pool, so that a backend may read starts as cumulated lengths.
        rows = sorted(plan.rows, key=_place)
        logits = self._forward(rows)
        sampled = [row for row in rows if row.samples]
        if not sampled:
            return []
        tokens = sampling.sample(
            logits,
            [row.sequence.sampling for row in sampled],
            [row.sequence.generated for row in sampled],
        )
        return list(zip(sampled, tokens, strict=True))

    def _forward(self, rows: list[Row]) -> torch.Tensor:
        """Return the logits of the rows that sample, (sampled, vocabulary)."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        kept: list[int] = []
        for row in rows:
            end = row.start + row.count
            place = _place(row)
            spans.append(Span(len(ids), row.count, place, end))
            ids += row.sequence.tokens[row.start : end]
            positions += range(row.start, end)
            slots += range(place + row.start, place + end)
            if row.samples:
                kept.append(len(ids) - 1)
        output = self._model(
            input_ids=self._tensor([ids]),
            position_ids=self._tensor([positions]),
            logits_to_keep=self._tensor(kept),
            use_cache=False,
            forward_pass=_CachedPass(self._cache, self._backend, tuple(spans), self._tensor(slots)),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _tensor(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


class _CachedPass:
    """A forward that writes K and V to their slots and attends over the cache."""

    def __init__(
        self, cache: KVCache, backend: Backend, spans: tuple[Span, ...], slots: torch.Tensor
    ) -> None:
        self._cache = cache
        self._attention = backend.begin(spans)
        self._slots = {slots.device: slots}
        self._origin = slots

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        """See `ForwardPass.attend`."""
        if key.device not in self._slots:
            self._slots[key.device] = self._origin.to(key.device)
        keys, values = self._cache.write(layer, self._slots[key.device], key, value)
        return self._attention.attend(query, keys, values, scoring)


def _place(row: Row) -> int:
    if row.sequence.region is None:
        raise ValueError(f"sequence {row.sequence.key} has no place in the cache")
    return row.sequence.region.start
