"""Attention by `scaled_dot_product_attention`, one call a row; the backend of the CPU.

K and V are read where they lie. Query heads that share a KV head are packed (decode: as rows
of one query, prefill: by a broadcast of K and V), because repeating K and V, or `enable_gqa`
with a mask, is several times slower on CPU (torch 2.13).
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from serve_app.engine.attention.step import Scoring, Span


class SdpaBackend:
    """Works on every device and with every kind of scoring."""

    name = "sdpa"

    def begin(self, spans: tuple[Span, ...]) -> SdpaStep:
        """Prepare a step."""
        return SdpaStep(spans)


class SdpaStep:
    """One step's attention; masks are made once and shared by the layers."""

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self._spans = spans
        self._masks: dict[tuple[Span, int | None], torch.Tensor] = {}

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See `StepAttention.attend`."""
        tokens, heads, _ = query.shape
        out = query.new_empty(tokens, heads, values.shape[-1])
        for span in self._spans:
            first, seen = _seen(span, scoring.window)
            queries = query[span.q_start : span.q_start + span.q_count]
            k = keys[first : first + seen].transpose(0, 1)
            v = values[first : first + seen].transpose(0, 1)
            part = self._row(queries, k, v, span, scoring)
            out[span.q_start : span.q_start + span.q_count] = part
        return out

    def _row(
        self,
        queries: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        span: Span,
        scoring: Scoring,
    ) -> torch.Tensor:
        """Attend from (count, heads, dim) to (kv_heads, seen, dim); return it in that order."""
        count, heads, dim = queries.shape
        kv_heads, seen, _ = k.shape
        group = heads // kv_heads
        if count == 1:
            packed = queries.view(kv_heads, 1, group, dim)
            k, v = k.unsqueeze(1), v.unsqueeze(1)
            mask, causal = None, False
        else:
            packed = queries.view(count, kv_heads, group, dim).permute(1, 2, 0, 3)
            k = k.unsqueeze(1).expand(-1, group, -1, -1)
            v = v.unsqueeze(1).expand(-1, group, -1, -1)
            causal = seen == count and (scoring.window is None or seen <= scoring.window)
            mask = None if causal and scoring.softcap is None else self._mask(span, scoring, packed)
        if scoring.softcap is not None:
            part = _softcapped(packed, k, v, mask, scoring.scale, scoring.softcap)
        else:
            part = scaled_dot_product_attention(
                packed, k, v, attn_mask=mask, is_causal=causal, scale=scoring.scale
            )
        if count == 1:
            return part.reshape(1, heads, -1)
        return part.permute(2, 0, 1, 3).reshape(count, heads, -1)

    def _mask(self, span: Span, scoring: Scoring, like: torch.Tensor) -> torch.Tensor:
        """Return what each query may not see as -inf, (count, seen), in the queries' dtype."""
        key = (span, scoring.window)
        if key not in self._masks:
            _, seen = _seen(span, scoring.window)
            at = torch.arange(span.kv_count - span.q_count, span.kv_count, device=like.device)
            keys_at = torch.arange(span.kv_count - seen, span.kv_count, device=like.device)
            hidden = keys_at > at[:, None]
            if scoring.window is not None:
                hidden |= keys_at <= at[:, None] - scoring.window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(hidden, -torch.inf)
        return self._masks[key].to(like.device)


def _seen(span: Span, window: int | None) -> tuple[int, int]:
    """Return the first key of the pool that any query of the span sees, and how many follow."""
    seen = span.kv_count
    if window is not None:
        seen = min(seen, window + span.q_count - 1)
    return span.kv_start + span.kv_count - seen, seen


def _softcapped(
    query: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """Attend with bounded scores, which no fused kernel of torch does.

    Source: Gemma 2, transformers' `eager_attention_forward`.
    """
    scores = torch.matmul(query, k.transpose(-1, -2)) * scale
    scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, v)
