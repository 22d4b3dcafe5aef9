"""Attention by torch's own FlashAttention over the flat pool; the backend of CUDA.

`torch.nn.attention.varlen.varlen_attn` takes the whole pool as one packed tensor: `cu_seq_k`
says where each sequence's region starts and `seqused_k` how much of it is filled, so nothing
is copied or gathered and no other package is needed (built-in FlashAttention 2).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch

from serve_app.engine.model.attention.step import LayerShape, Scoring, Span

# What this backend asks of the API; torch 2.11 has all of it, older ones lack some.
NEEDED = frozenset({"scale", "window_size", "enable_gqa", "seqused_k"})
# FlashAttention 2's limits.
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)


def find_varlen_attn() -> Callable[..., torch.Tensor] | None:
    """Return torch's `varlen_attn` if this torch has it with everything needed."""
    try:
        found = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return found if inspect.signature(found).parameters.keys() >= NEEDED else None


def supports(shapes: Iterable[LayerShape]) -> bool:
    """Tell whether every layer fits FlashAttention 2 on its device."""
    return all(
        shape.device.type == "cuda"
        and torch.cuda.get_device_capability(shape.device) >= MIN_CAPABILITY
        and shape.dtype in (torch.bfloat16, torch.float16)
        and shape.key_dim == shape.value_dim <= MAX_HEAD_DIM
        and shape.key_dim % 8 == 0
        and not shape.softcap
        for shape in shapes
    )


class VarlenBackend:
    """FlashAttention 2 as torch ships it.

    Args:
        attend: torch's `varlen_attn`.
    """

    name = "varlen"

    def __init__(self, attend: Callable[..., torch.Tensor]) -> None:
        self._attend = attend

    def begin(self, spans: tuple[Span, ...]) -> VarlenStep:
        """Prepare a step."""
        last = spans[-1]
        lists = {
            "cu_seq_q": [*(span.q_start for span in spans), last.q_start + last.q_count],
            "cu_seq_k": [*(span.kv_start for span in spans), last.kv_start + last.kv_count],
            "seqused_k": [span.kv_count for span in spans],
        }
        return VarlenStep(
            self._attend,
            {name: torch.tensor(values, dtype=torch.int32) for name, values in lists.items()},
            max_q=max(span.q_count for span in spans),
            max_k=max(span.kv_count for span in spans),
        )

    def decode(self, indices: dict[str, torch.Tensor], *, max_k: int) -> VarlenStep:
        """Prepare a step of single queries whose places are read when it runs.

        Args:
            indices: int32 on the layers' device, as `varlen_attn` calls them: `cu_seq_q` and
                `cu_seq_k`, (rows + 1,), and `seqused_k`, (rows,).
            max_k: keys of the longest row at the most.
        """
        return VarlenStep(self._attend, indices, max_q=1, max_k=max_k)


class VarlenStep:
    """One step's attention; the index tensors are copied once to each device."""

    def __init__(
        self,
        attend: Callable[..., torch.Tensor],
        indices: dict[str, torch.Tensor],
        *,
        max_q: int,
        max_k: int,
    ) -> None:
        self._attend = attend
        self._indices = indices
        self._max_q = max_q
        self._max_k = max_k
        self._copies: dict[torch.device, dict[str, Any]] = {}

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See `StepAttention.attend`."""
        # (left, right) without the query itself; right = 0 is causal, aligned to the last key in
        # use. Single queries see all keys in use anyway, and only without any window does the
        # kernel share K and V among a group's heads and split long ones (flash_api.cpp, 2.13).
        window = (-1, -1) if self._max_q == 1 else (-1, 0)
        if scoring.window is not None:
            window = (scoring.window - 1, 0)
        return self._attend(
            query,
            keys,
            values,
            max_q=self._max_q,
            max_k=self._max_k,
            scale=scoring.scale,
            window_size=window,
            enable_gqa=query.shape[1] != keys.shape[1],
            **self._on(query.device),
        )

    def _on(self, device: torch.device) -> dict[str, Any]:
        if device not in self._copies:
            self._copies[device] = {
                name: tensor.to(device) for name, tensor in self._indices.items()
            }
        return self._copies[device]
