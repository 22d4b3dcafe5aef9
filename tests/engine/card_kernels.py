"""What a CUDA card computes otherwise than a CPU, on plain CPU tensors; see `card.py`."""

from __future__ import annotations

import torch

SCAN_ITEMS = 4  # of a thread, in a prefix sum of one row


def prefix_sum(tensor: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sum up as CUDA does: exactly id by id for many rows, by threads for a single one.

    Source: torch 2.13, `ScanUtils.cuh` and cub's `inclusive_scan`: a thread sums a few items up
    and adds the sum of all threads before it, which comes from a tree.
    """
    tensor = tensor.to(dtype or tensor.dtype)
    length = tensor.shape[dim]
    if tensor.numel() != length or not tensor.is_floating_point():
        return tensor.cumsum(dim)
    padding = -length % SCAN_ITEMS
    items = torch.nn.functional.pad(tensor.flatten(), (0, padding)).view(-1, SCAN_ITEMS)
    inside = items.cumsum(1)
    before, reach = inside[:, -1].clone(), 1
    while reach < len(before):  # Kogge and Stone
        before = torch.cat((before[:reach], before[reach:] + before[:-reach]))
        reach *= 2
    inside[1:] += before[:-1, None]
    return inside.flatten()[:length].view(tensor.shape)


def flash_attention(  # noqa: PLR0917 (torch's signature)
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float,
    window_size_left: int,
    window_size_right: int,
    seqused_k: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Demand what the kernel demands, then attend; no value of a tensor reaches Python.

    Source: torch 2.13, flash_api.cpp, `mha_varlen_fwd`.
    """
    assert not dropout_p
    assert not return_debug_mask
    used = seqused_k
    rows, (tokens, heads, dim), kv_heads = len(used), query.shape, key.shape[1]
    assert query.dtype == key.dtype == value.dtype
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in (cu_q, cu_k, used))
    assert len(cu_q) == len(cu_k) == rows + 1
    assert dim <= 256
    assert dim % 8 == 0 == heads % kv_heads
    left, right = window_size_left, 0 if is_causal and max_q > 1 else window_size_right
    row = (torch.searchsorted(cu_q, torch.arange(tokens, dtype=torch.int32), right=True) - 1).clamp(
        max=rows - 1
    )
    last = used[row].long() - (cu_q[1:] - cu_q[:-1])[row].long()
    at = (last + torch.arange(tokens) - cu_q[row].long())[:, None]
    keys_at = torch.arange(max_k)
    seen = keys_at < used[row].long()[:, None]
    if right >= 0:
        seen &= keys_at <= at + right
    if left >= 0:
        seen &= keys_at >= at - left
    places = (cu_k[:-1][row].long()[:, None] + keys_at).clamp(max=len(key) - 1)
    grouped = query.float().view(tokens, kv_heads, -1, dim)
    scores = torch.einsum("tgqd,tkgd->tgqk", grouped, key[places].float()) * scale
    weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
    out = torch.einsum("tgqk,tkgd->tgqd", weights, value[places].float())
    return out.reshape(tokens, heads, dim).to(query.dtype), torch.zeros(heads, tokens), used
