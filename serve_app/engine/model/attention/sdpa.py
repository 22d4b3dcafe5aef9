"""Attention by `scaled_dot_product_attention`, one call a row; the backend of the CPU.

K and V are read where they lie. Query heads that share a KV head are packed (decode: as rows
of one query, prefill: by a broadcast of K and V), because repeating K and V, or `enable_gqa`
with a mask, is several times slower on CPU (torch 2.13).
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from serve_app.engine.model.attention.step import Scoring, Span


class SdpaBackend:
    """Works on every device and with every kind of scoring."""

    name = "sdpa"

    def begin(self, spans: tuple[Span, ...]) -> SdpaStep:
        """Prepare a step."""
        return SdpaStep(spans)


class SdpaStep:
    """One step's attention; masks are made once and shared by the layers."""

    def __init__(self, spans: tuple[Span, ...]) -> None:
        self._decode = tuple(span for span in spans if span.q_count == 1)
        self._chunks = tuple(span for span in spans if span.q_count > 1)
        self._decode_at = [span.q_start for span in self._decode]
        self._masks: dict[tuple[Span, int | None], torch.Tensor] = {}

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """See `StepAttention.attend`."""
        if not self._chunks:
            return self._decode_rows(query, keys, values, scoring)
        out = query.new_empty(*query.shape[:2], values.shape[-1])
        if self._decode:
            queries = query[self._decode_at]
            out[self._decode_at] = self._decode_rows(queries, keys, values, scoring)
        for span in self._chunks:
            part = slice(span.q_start, span.q_start + span.q_count)
            out[part] = self._chunk(query[part], keys, values, span, scoring)
        return out

    def _decode_rows(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring
    ) -> torch.Tensor:
        """Attend with one query a row, (rows, heads, dim); a KV head's queries are one block."""
        rows, heads, dim = query.shape
        kv_heads = keys.shape[1]
        blocks = query.reshape(rows, kv_heads, heads // kv_heads, dim).split(1)
        parts = []
        for span, block in zip(self._decode, blocks, strict=True):
            k, v = _region(keys, span, scoring), _region(values, span, scoring)
            if scoring.softcap is None:
                part = scaled_dot_product_attention(block, k, v, scale=scoring.scale)
            else:
                part = _softcapped(block, k, v, None, scoring.scale, scoring.softcap)
            parts.append(part)
        return torch.cat(parts).view(rows, heads, -1)

    def _chunk(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        span: Span,
        scoring: Scoring,
    ) -> torch.Tensor:
        """Attend with a prompt's chunk, (count, heads, dim); its heads read one K and V."""
        count, heads, dim = query.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        blocks = query.view(count, kv_heads, group, dim).permute(1, 2, 0, 3)
        k, v = (
            _region(pool, span, scoring)[0].unsqueeze(1).expand(-1, group, -1, -1)
            for pool in (keys, values)
        )
        # torch's `is_causal` aligns to the first key: right only where the chunk is all there is.
        whole = span.kv_count == count and (scoring.window is None or count <= scoring.window)
        if scoring.softcap is not None:
            mask = self._mask(span, scoring, query)
            part = _softcapped(blocks, k, v, mask, scoring.scale, scoring.softcap)
        elif whole:
            part = scaled_dot_product_attention(blocks, k, v, is_causal=True, scale=scoring.scale)
        else:
            mask = self._mask(span, scoring, query)
            part = scaled_dot_product_attention(blocks, k, v, attn_mask=mask, scale=scoring.scale)
        return part.permute(2, 0, 1, 3).reshape(count, heads, -1)

    def _mask(self, span: Span, scoring: Scoring, like: torch.Tensor) -> torch.Tensor:
        """Return what each query may not see as -inf, (count, seen), in the queries' dtype."""
        key = (span, scoring.window)
        if key not in self._masks:
            seen = _seen(span, scoring.window)
            at = torch.arange(span.kv_count - span.q_count, span.kv_count, device=like.device)
            keys_at = torch.arange(span.kv_count - seen, span.kv_count, device=like.device)
            hidden = keys_at > at[:, None]
            if scoring.window is not None:
                hidden |= keys_at <= at[:, None] - scoring.window
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(hidden, -torch.inf)
        return self._masks[key].to(like.device)


def _seen(span: Span, window: int | None) -> int:
    """Return how many keys the span's queries see together, the last ones it has."""
    return span.kv_count if window is None else min(span.kv_count, window + span.q_count - 1)


def _region(pool: torch.Tensor, span: Span, scoring: Scoring) -> torch.Tensor:
    """Return what the span sees of a pool, (1, kv_heads, seen, dim), in place."""
    _, heads, dim = pool.shape
    seen = _seen(span, scoring.window)
    first = span.kv_start + span.kv_count - seen
    # A view: `transpose` and `narrow` would come to the same, in three calls a row and layer.
    return pool.as_strided(
        (1, heads, seen, dim), (0, dim, heads * dim, 1), pool.storage_offset() + first * heads * dim
    )


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
