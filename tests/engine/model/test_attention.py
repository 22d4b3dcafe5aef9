"""The backends against attention written out, for every kind of row and scoring."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from structlog.testing import capture_logs

from serve_app.engine.model.attention import interface
from serve_app.engine.model.attention.interface import attend, choose_backend
from serve_app.engine.model.attention.sdpa import SdpaBackend
from serve_app.engine.model.attention.step import LayerShape, Scoring, Span
from serve_app.engine.model.attention.varlen import VarlenBackend, find_flash_attention
from serve_app.errors import ModelLoadError

DIM, VALUE_DIM, POOL = 16, 16, 120
# Decode rows, whole prompts and later chunks, in regions that are apart in the pool.
MIXED = (Span(0, 1, 3, 9), Span(1, 1, 70, 1), Span(2, 6, 20, 6), Span(8, 4, 40, 17))
DECODE = (Span(0, 1, 3, 9), Span(1, 1, 20, 33), Span(2, 1, 60, 1))
SCORINGS = (
    Scoring(0.25),
    Scoring(0.25, window=4),
    Scoring(0.25, window=100),
    Scoring(0.3, softcap=2.0),
    Scoring(0.3, window=3, softcap=2.0),
)


def written_out(query, keys, values, spans, scoring):
    """Every query by itself, in float64."""
    group = query.shape[1] // keys.shape[1]
    out = torch.empty(query.shape[0], query.shape[1], values.shape[2])
    for span in spans:
        for i in range(span.q_count):
            at = span.kv_count - span.q_count + i
            first = 0 if scoring.window is None else max(0, at - scoring.window + 1)
            seen = slice(span.kv_start + first, span.kv_start + at + 1)
            for head in range(query.shape[1]):
                k, v = keys[seen, head // group].double(), values[seen, head // group].double()
                scores = k @ query[span.q_start + i, head].double() * scoring.scale
                if scoring.softcap is not None:
                    scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
                out[span.q_start + i, head] = scores.softmax(-1) @ v
    return out


def tensors(heads, spans, value_dim=VALUE_DIM):
    """Return random (query, keys, values) for a pair (heads, kv_heads)."""
    heads, kv_heads = heads
    generator = torch.Generator().manual_seed(heads)
    tokens = sum(span.q_count for span in spans)
    shapes = ((tokens, heads, DIM), (POOL, kv_heads, DIM), (POOL, kv_heads, value_dim))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=str)
@pytest.mark.parametrize("spans", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("scoring", SCORINGS, ids=str)
def test_sdpa_is_attention(heads, spans, scoring):
    """Causal, windowed and softcapped, with shared KV heads, over the pool in place."""
    query, keys, values = tensors(heads, spans)
    out = SdpaBackend().begin(spans).attend(query, keys, values, scoring)
    torch.testing.assert_close(out, written_out(query, keys, values, spans, scoring))


def test_sdpa_takes_values_of_another_size():
    """K and V heads may differ in size."""
    query, keys, values = tensors((4, 2), MIXED, value_dim=8)
    out = SdpaBackend().begin(MIXED).attend(query, keys, values, Scoring(0.25))
    torch.testing.assert_close(out, written_out(query, keys, values, MIXED, Scoring(0.25)))


def documented_flash_attention(  # noqa: PLR0917 (torch's signature)
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    scale,
    window,
    seqused_k,
):
    """What torch documents of its FlashAttention, written out for the CPU."""
    assert all(t.dtype == torch.int32 for t in (cu_seq_q, cu_seq_k, seqused_k))
    assert (cu_seq_k.diff() > 0).all()
    out = torch.empty(*query.shape[:2], value.shape[2])
    group = query.shape[1] // key.shape[1]
    left, right = window
    for row in range(len(seqused_k)):
        q0, q1 = cu_seq_q[row : row + 2].tolist()
        k0, used = int(cu_seq_k[row]), int(seqused_k[row])
        assert q1 - q0 <= max_q
        assert used <= max_k
        q = query[q0:q1].transpose(0, 1)
        k = key[k0 : k0 + used].transpose(0, 1).repeat_interleave(group, 0)
        v = value[k0 : k0 + used].transpose(0, 1).repeat_interleave(group, 0)
        at = torch.arange(used - (q1 - q0), used)[:, None]
        keys_at = torch.arange(used)
        seen = torch.ones(q1 - q0, used, dtype=torch.bool)
        if left >= 0:
            seen &= keys_at >= at - left
        if right >= 0:
            seen &= keys_at <= at + right
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(~seen, -math.inf)
        out[q0:q1] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
@pytest.mark.parametrize("spans", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("scoring", SCORINGS[:3], ids=str)
def test_varlen_asks_for_what_sdpa_does(heads, spans, scoring):
    """Starts, lengths and windows handed to FlashAttention mean the same attention."""
    query, keys, values = tensors(heads, spans)
    step = VarlenBackend(documented_flash_attention).begin(spans)
    out = step.attend(query, keys, values, scoring)
    torch.testing.assert_close(out, written_out(query, keys, values, spans, scoring))


@pytest.mark.parametrize("window", [None, 4, 100])
def test_varlen_gives_single_queries_the_fast_kernel(window):
    """A call of their own and no window: then heads share K and V, and long rows are split."""
    calls = []

    def attend(query, keys, values, **how):
        rows = how["cu_seq_q"].diff().tolist()
        calls.append((rows, how["max_q"], how["window"], how["seqused_k"].tolist()))
        return documented_flash_attention(query, keys, values, **how)

    query, keys, values = tensors((4, 2), MIXED)
    scoring = Scoring(0.25, window=window)
    VarlenBackend(attend).begin(MIXED).attend(query, keys, values, scoring)
    left = -1 if window is None else window - 1
    used = [min(9, window or 9), 1]
    assert calls == [([1, 1], 1, (-1, -1), used), ([6, 4], 6, (left, 0), [6, 17])]


def test_find_flash_attention_in_this_torch(monkeypatch):
    """The installed torch takes every argument that the backend passes, by its own schema."""
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    found = find_flash_attention()
    assert found is not None
    query, index = torch.zeros(2, 4, 8, device="meta"), torch.zeros(3, dtype=torch.int32)
    index = index.to("meta")
    indices = {"cu_seq_q": index, "cu_seq_k": index, "seqused_k": index[:2]}
    pool = torch.zeros(6, 2, 8, device="meta")
    out = found(query, pool, pool, **indices, max_q=1, max_k=3, scale=1.0, window=(-1, 0))
    assert out.shape == query.shape


@pytest.mark.parametrize("missing", ["operator", "seqused_k", "kernel"])
def test_find_flash_attention_is_none_without_it(monkeypatch, missing):
    """An older torch, or one built without the kernel, computes by SDPA instead of failing."""
    available = missing != "kernel"
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: available)
    old = SimpleNamespace(_schema=SimpleNamespace(arguments=[SimpleNamespace(name="scale")]))
    packet = SimpleNamespace() if missing == "operator" else SimpleNamespace(default=old)
    if missing != "kernel":
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", packet)
    assert find_flash_attention() is None


@pytest.mark.parametrize("found", [None, documented_flash_attention])
def test_choose_backend_warns_of_a_gpu_without_flash_attention(monkeypatch, found):
    """It works, and it is slow; a CPU and an old GPU have nothing to gain by a newer torch."""
    monkeypatch.setattr(interface, "find_flash_attention", lambda: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    shape = LayerShape(2, 64, 64, torch.device("cuda:0"), torch.bfloat16, softcap=False)
    with capture_logs() as logs:
        assert choose_backend([shape]).name == ("varlen" if found else "sdpa")
        assert choose_backend([replace(shape, device=torch.device("cpu"))]).name == "sdpa"
        assert choose_backend([replace(shape, softcap=True)]).name == "sdpa"
    warned = [(log["event"], log["log_level"]) for log in logs]
    assert warned == ([] if found else [("engine.varlen_unavailable", "warning")])


def test_choose_backend_takes_sdpa_on_a_cpu():
    """FlashAttention is for CUDA."""
    shape = LayerShape(2, 64, 64, torch.device("cpu"), torch.bfloat16, softcap=False)
    assert choose_backend([shape]).name == "sdpa"


def test_attend_refuses_sinks():
    """An attention that would be computed wrongly is an error, not another answer."""
    part = torch.zeros(1, 2, 1, 8)
    with pytest.raises(ModelLoadError, match="sinks"):
        attend(None, part, part, part, None, s_aux=torch.zeros(2))
