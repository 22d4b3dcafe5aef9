"""What attention needs to know of a step, and the words the backends share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Span:
    """One row of a step: its queries in the packed batch, its keys in the pool.

    Args:
        q_start: first query in the packed batch.
        q_count: queries, >= 1.
        kv_start: where the sequence's region of the pool starts.
        kv_count: keys of the sequence, those of this step included.
    """

    q_start: int
    q_count: int
    kv_start: int
    kv_count: int


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one attention layer keeps and asks for, as seen in a forward.

    Args:
        kv_heads: heads of K and V.
        key_dim: size of one head of K.
        value_dim: size of one head of V.
        device: where the layer computes.
        dtype: of K and V.
        softcap: the layer bounds its scores (Gemma 2).
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    device: torch.device
    dtype: torch.dtype
    softcap: bool

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer turns queries and keys into weights.

    Args:
        scale: factor of the scores.
        window: tokens that a query sees, itself included; None is all before it.
        softcap: bound of the scores by tanh; None is none.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


class StepAttention(Protocol):
    """One step's attention; made once, used by every layer."""

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Let every query see its own sequence's keys up to its own position.

        Args:
            query: (tokens, heads, key_dim), the packed batch.
            keys: (pool_tokens, kv_heads, key_dim), this step's keys already written.
            values: (pool_tokens, kv_heads, value_dim), likewise.
            scoring: the layer's.

        Returns:
            (tokens, heads, value_dim).
        """
        ...


class Backend(Protocol):
    """A way to compute attention."""

    name: str

    def begin(self, spans: tuple[Span, ...]) -> StepAttention:
        """Prepare a step.

        Args:
            spans: in the order of the packed batch: those of one query first, then the others,
                each kind in the order of the pool.
        """
        ...
