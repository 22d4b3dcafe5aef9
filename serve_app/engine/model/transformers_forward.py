"""A packed step through transformers' own model, whatever its architecture."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch

from serve_app.engine.model.attention.step import Backend, Scoring, Span, StepAttention
from serve_app.engine.model.kv_cache import KVCache
from serve_app.engine.sequence import Move, Row


@dataclass(frozen=True, slots=True)
class Packed:
    """The tokens of a step, one after the other; int64, where token ids go in.

    Args:
        ids: (tokens,).
        positions: (tokens,), each one's in its sequence.
        slots: (tokens,), each one's place in the cache.
        kept: which of them need logits, in the order of the result; a list has no device.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    kept: torch.Tensor | list[int]


class TransformersForward:
    """See `Forward`.

    Args:
        model: a transformers causal LM that attends through our interface.
        cache: its KV cache.
        backend: how to attend.
        device: where token ids go in.
        spread: its layers are on several devices.
    """

    def __init__(
        self,
        model: Any,
        cache: KVCache,
        backend: Backend,
        device: torch.device,
        *,
        spread: bool = False,
    ) -> None:
        self._model = model
        self._cache = cache
        self._backend = backend
        self._device = device
        self._spread = spread

    def move(self, moves: tuple[Move, ...]) -> None:
        """See `Forward.move`."""
        self._cache.move(moves)

    def logits(self, rows: list[Row]) -> torch.Tensor:
        """See `Forward.logits`."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[Span] = []
        kept: list[range] = [range(0)] * len(rows)
        # Single queries first: a backend may have a faster way for them.
        for index, row in sorted(enumerate(rows), key=lambda each: each[1].count > 1):
            end = row.start + row.count
            place = row.place
            spans.append(Span(len(ids), row.count, place, end))
            ids += row.ids
            positions += range(row.start, end)
            slots += range(place + row.start, place + end)
            kept[index] = range(len(ids) - row.kept, len(ids))
        flat = list(itertools.chain.from_iterable(kept))
        # The logits' device need not be the first, and accelerate's hooks move every tensor that
        # `model.forward` is given there. Numbers stay as they are.
        wanted = flat if self._spread else self._tensor(flat)
        packed = Packed(self._tensor(ids), self._tensor(positions), self._tensor(slots), wanted)
        return self.compute(packed, self._backend.begin(tuple(spans)))

    def compute(self, packed: Packed, attention: StepAttention) -> torch.Tensor:
        """Compute packed tokens; see `Forward.logits`."""
        output = self._model(
            input_ids=packed.ids[None],
            position_ids=packed.positions[None],
            logits_to_keep=packed.kept,
            use_cache=False,
            forward_pass=_CachedPass(self._cache, attention, packed.slots),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)


class _CachedPass:
    """A forward that writes K and V to their slots and attends over the cache."""

    def __init__(self, cache: KVCache, attention: StepAttention, slots: torch.Tensor) -> None:
        self._cache = cache
        self._attention = attention
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
