"""Attention by torch's own FlashAttention over the flat pool; the backend of CUDA.

`aten::_flash_attention_forward` takes the whole pool as one packed tensor: `cu_seq_k` says where
each sequence's region starts and `seqused_k` how much of it is filled, so nothing is copied or
gathered and no other package is needed (built-in FlashAttention 2). It is what
`torch.nn.attention.varlen.varlen_attn` calls, which does not hand on `seqused_k` in torch 2.11 and
costs a kernel and two dispatches a layer more.

The kernel works on tiles of 128 queries of one row and one head. Only a call without any longer
row and without a window shares K and V among a group's heads and splits long ones (torch 2.13,
flash_api.cpp). So single queries get a call of their own, and their window is not the kernel's
but the end of their region.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch

from serve_app.engine.model.attention.step import LayerShape, Scoring, Span, StepAttention

# What this backend asks of the operator beyond its first form.
NEEDED = frozenset({"scale", "window_size_left", "window_size_right", "seqused_k"})
# FlashAttention 2's limits.
MAX_HEAD_DIM = 256
MIN_CAPABILITY = (8, 0)


Attend = Callable[..., torch.Tensor]


def find_flash_attention() -> Attend | None:
    """Return `flash_attention` if this torch has it with everything needed."""
    try:
        forward = torch.ops.aten._flash_attention_forward.default
    except AttributeError:
        return None
    names = {argument.name for argument in forward._schema.arguments}
    if not names >= NEEDED or not torch.backends.cuda.is_flash_attention_available():
        return None
    return flash_attention


def flash_attention(  # noqa: PLR0913 (the operator's)
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    seqused_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Attend with packed queries over regions of one pool.

    Args:
        query: (tokens, heads, dim), bfloat16 or float16.
        keys: (pool_tokens, kv_heads, dim).
        values: like `keys`.
        cu_seq_q: where each row's queries start and the last one's end; int32, (rows + 1,).
        cu_seq_k: the same of its region of the pool.
        seqused_k: keys in use from there on; int32, (rows,). The last is the last query's own.
        max_q: queries of the longest row.
        max_k: keys of the longest row, at the most.
        scale: of the scores.
        window: keys that a query sees before and after its own; -1 is all.

    Returns:
        (tokens, heads, dim).
    """
    output: torch.Tensor = torch.ops.aten._flash_attention_forward.default(
        query,
        keys,
        values,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        dropout_p=0.0,
        is_causal=window == (-1, 0),
        return_debug_mask=False,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
        seqused_k=seqused_k,
    )[0]
    return output


def supports(shapes: Iterable[LayerShape]) -> bool:
    """Return whether every layer fits FlashAttention 2 on its device."""
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
        attend: `flash_attention`, or another way to compute the same.
    """

    name = "varlen"

    def __init__(self, attend: Attend) -> None:
        self._attend = attend

    def begin(self, spans: tuple[Span, ...]) -> StepAttention:
        """Prepare a step; see `Backend.begin`."""
        singles = tuple(span for span in spans if span.q_count == 1)
        count = len(singles)
        if count in {0, len(spans)}:
            return self._step(spans)
        chunks = tuple(replace(span, q_start=span.q_start - count) for span in spans[count:])
        return MixedStep(self._step(singles), self._step(chunks), count)

    def _step(self, spans: tuple[Span, ...]) -> VarlenStep:
        last = spans[-1]
        lists = {
            "cu_seq_q": [*(span.q_start for span in spans), last.q_start + last.q_count],
            # Starts need not be where the one before ends: `seqused_k` says how far each is read.
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
            indices: on the layers' device, as `flash_attention` calls them: `cu_seq_q`,
                `cu_seq_k` and `seqused_k`.
            max_k: keys of the longest row at the most.
        """
        return VarlenStep(self._attend, indices, max_q=1, max_k=max_k)


class MixedStep:
    """One step's attention with two calls a layer.

    Args:
        singles: of the rows of one query.
        chunks: of the others, which come after them.
        count: of the former.
    """

    def __init__(self, singles: StepAttention, chunks: StepAttention, count: int) -> None:
        self._singles = singles
        self._chunks = chunks
        self._count = count

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See `StepAttention.attend`."""
        singles, chunks = query[: self._count], query[self._count :]
        return torch.cat(
            (
                self._singles.attend(singles, keys, values, scoring),
                self._chunks.attend(chunks, keys, values, scoring),
            )
        )


class VarlenStep:
    """One step's attention; the index tensors are made once for each device and window."""

    def __init__(
        self,
        attend: Attend,
        indices: dict[str, torch.Tensor],
        *,
        max_q: int,
        max_k: int,
    ) -> None:
        self._attend = attend
        self._indices = indices
        self._max_q = max_q
        self._max_k = max_k
        self._copies: dict[tuple[torch.device, int | None], dict[str, Any]] = {}

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See `StepAttention.attend`."""
        max_k, cut = self._max_k, None
        # (left, right) without the query itself; right = 0 is causal, aligned to the last key in
        # use. A single query sees all keys in use anyway.
        window = (-1, 0)
        if self._max_q == 1:
            window, cut = (-1, -1), scoring.window
            max_k = max_k if cut is None else min(max_k, cut)
        elif scoring.window is not None:
            window = (scoring.window - 1, 0)
        return self._attend(
            query,
            keys,
            values,
            max_q=self._max_q,
            max_k=max_k,
            scale=scoring.scale,
            window=window,
            **self._on(query.device, cut),
        )

    def _on(self, device: torch.device, cut: int | None) -> dict[str, Any]:
        """Return the indices on a device, of regions cut to their last `cut` tokens."""
        key = (device, cut)
        if key not in self._copies:
            indices = {name: tensor.to(device) for name, tensor in self._indices.items()}
            self._copies[key] = indices if cut is None else _ends(indices, cut)
        return self._copies[key]


def _ends(indices: dict[str, torch.Tensor], tokens: int) -> dict[str, torch.Tensor]:
    """Cut regions to their last tokens; nothing is read on the host, so a graph can hold it."""
    used = indices["seqused_k"].clamp(max=tokens)
    starts = indices["cu_seq_k"].clone()
    starts[:-1] += indices["seqused_k"] - used
    return {**indices, "cu_seq_k": starts, "seqused_k": used}
