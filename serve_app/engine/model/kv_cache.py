"""The pools of K and V: one flat pool of tokens a layer, allocated once from a budget."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy
import torch

from serve_app.engine.model.attention.step import LayerShape
from serve_app.engine.sequence import Move


class KVCache:
    """K and V of every layer for `tokens` tokens, on the layers' devices.

    Args:
        shapes: by layer index.
        tokens: size of each pool.
    """

    def __init__(self, shapes: dict[int, LayerShape], tokens: int) -> None:
        self.tokens = tokens
        self.bytes = tokens * sum(shape.bytes_per_token for shape in shapes.values())
        # Zeros and not garbage: no NaN.
        self._layers = {
            layer: (
                _zeros(tokens, shape.kv_heads, shape.key_dim, shape),
                _zeros(tokens, shape.kv_heads, shape.value_dim, shape),
            )
            for layer, shape in shapes.items()
        }

    def write(
        self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store one layer's K and V of a step.

        Args:
            layer: its index.
            slots: int64, (tokens,), each token's place in the pool.
            key: (tokens, kv_heads, key_dim).
            value: (tokens, kv_heads, value_dim).

        Returns:
            The layer's pools, (pool_tokens, kv_heads, dim) each.
        """
        keys, values = self._layers[layer]
        keys.index_copy_(0, slots, key)
        values.index_copy_(0, slots, value)
        return keys, values

    def move(self, moves: tuple[Move, ...]) -> None:
        """Copy sequences to their new places, in order."""
        for move in moves:
            source = slice(move.source, move.source + move.length)
            target = slice(move.target, move.target + move.length)
            for pool in (pool for pools in self._layers.values() for pool in pools):
                pool[target] = pool[source]


def tokens_for(shapes: dict[int, LayerShape], budgets: dict[torch.device, int]) -> int:
    """Return how many tokens fit every device's budget in bytes."""
    per_token: dict[torch.device, int] = defaultdict(int)
    for shape in shapes.values():
        per_token[shape.device] += shape.bytes_per_token
    return min(max(0, budgets[device]) // size for device, size in per_token.items())


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return zeros; on a CPU their pages take no memory until they are used."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    # numpy asks the system for fresh pages, which are zero by themselves; torch writes zeros.
    raw = numpy.zeros(math.prod(shape) * dtype.itemsize, dtype=numpy.uint8)
    return torch.from_numpy(raw).view(dtype).view(*shape)


def _zeros(tokens: int, heads: int, dim: int, shape: LayerShape) -> torch.Tensor:
    return zeros(tokens, heads, dim, dtype=shape.dtype, device=shape.device)
