"""Recognise a Llama-like transformers model and repack its weights for forward.cpp.

A packed matrix is a row of panels of 32 output columns, each (inputs / depth, 32, depth) with
depth 2 for bfloat16 and 1 for float32: what one dot-product instruction reads is side by side.
Each original is dropped as soon as it is packed, so loading never holds two copies.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from serve_app.engine.model.llama_like import difference, window_of
from serve_app.engine.model.native.huge_pages import HugePages

COLUMNS = 32
DEPTH = {torch.bfloat16: 2, torch.float32: 1}


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, packed; vectors are float32."""

    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    out: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    attention_norm: torch.Tensor
    mlp_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    window: int


@dataclass(frozen=True, slots=True)
class Weights:
    """A whole model, packed, and its sizes.

    Args:
        embedding: (vocabulary, hidden), or None where the head holds the same numbers.
        head: packed, `vocabulary` columns.
        cos: float32, (positions, rotary / 2), and `sin` likewise.
    """

    layers: tuple[LayerWeights, ...]
    embedding: torch.Tensor | None
    head: torch.Tensor
    norm: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    eps: float
    scale: float


def unsupported(model: Any) -> str | None:
    """Return why forward.cpp cannot compute this model, or None if it can."""
    if reason := difference(model):
        return reason
    if model.dtype not in DEPTH:
        return f"{model.dtype} is not packed"
    attention, config = model.model.layers[0].self_attn, model.config
    sizes = (attention.head_dim % 2, config.hidden_size % 2, config.intermediate_size % 16)
    if any(sizes) or attention.head_dim > 512:
        return "its sizes do not fit the panels"
    return None


def bytes_per_token(model: Any) -> int:
    """Return the bytes of K and V of one token in all layers of a supported model."""
    attention, config = model.model.layers[0].self_attn, model.config
    padded = attention.head_dim + -attention.head_dim % COLUMNS  # values lie in whole panels
    numbers = config.num_hidden_layers * config.num_key_value_heads * (attention.head_dim + padded)
    return int(numbers * model.dtype.itemsize)


def take(model: Any, positions: int) -> Weights:
    """Pack a supported model's weights and empty it.

    Args:
        model: a transformers causal LM on the CPU; unusable afterwards.
        positions: tokens that rotary tables are made for.
    """
    base, config = model.model, model.config
    cos, sin = _rotary(base.rotary_emb, positions, config.hidden_size)
    attention = base.layers[0].self_attn
    windows = [window_of(layer.self_attn, config) or 0 for layer in base.layers]
    tied = model.lm_head.weight.data_ptr() == base.embed_tokens.weight.data_ptr()
    memory = HugePages()
    head = pack(model.lm_head.weight, memory)
    embedding = None if tied else base.embed_tokens.weight.detach()
    _drop(model.lm_head)
    if tied:
        _drop(base.embed_tokens)
    return Weights(
        layers=tuple(
            _take_layer(layer, window, memory)
            for layer, window in zip(base.layers, windows, strict=True)
        ),
        embedding=embedding,
        head=head,
        norm=_vector(base.norm.weight),
        cos=cos,
        sin=sin,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        vocabulary=config.vocab_size,
        eps=base.norm.variance_epsilon,
        scale=attention.scaling,
    )


def pack(weight: torch.Tensor, memory: HugePages) -> torch.Tensor:
    """Pack (outputs, inputs) into panels; outputs are padded with zeros to whole panels."""
    depth = DEPTH[weight.dtype]
    outputs, inputs = weight.shape
    padded = weight.detach()
    if outputs % COLUMNS:  # padding copies, and a head may be a third of a model
        padded = nn.functional.pad(padded, (0, 0, 0, -outputs % COLUMNS))
    panels = padded.view(-1, COLUMNS, inputs // depth, depth).transpose(1, 2)
    packed = memory.empty(panels.numel(), weight.dtype)
    packed.view(panels.shape).copy_(panels)
    return packed


def _take_layer(layer: Any, window: int, memory: HugePages) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = None
    if projections[0].bias is not None:
        joined = torch.cat([part.bias.detach().float() for part in projections])
        bias = nn.functional.pad(joined, (0, -len(joined) % COLUMNS))
    qkv = pack(torch.cat([part.weight.detach() for part in projections]), memory)
    _drop(*projections)
    out = pack(attention.o_proj.weight, memory)
    _drop(attention.o_proj)
    # A panel holds 16 gate columns and the same 16 up columns, so that it ends with a product.
    halves = [part.weight.detach() for part in (mlp.gate_proj, mlp.up_proj)]
    half = COLUMNS // 2
    gate_up = pack(
        torch.stack([part.view(-1, half, part.shape[1]) for part in halves], dim=1).flatten(0, 2),
        memory,
    )
    _drop(mlp.gate_proj, mlp.up_proj)
    down = pack(mlp.down_proj.weight, memory)
    _drop(mlp.down_proj)
    _trim()
    return LayerWeights(
        qkv=qkv,
        qkv_bias=bias,
        out=out,
        gate_up=gate_up,
        down=down,
        attention_norm=_vector(layer.input_layernorm.weight),
        mlp_norm=_vector(layer.post_attention_layernorm.weight),
        query_norm=_vector(attention.q_norm.weight) if hasattr(attention, "q_norm") else None,
        key_norm=_vector(attention.k_norm.weight) if hasattr(attention, "k_norm") else None,
        window=window,
    )


def _rotary(rotary: Any, positions: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ask the model's own rotary embedding, whatever its scaling, for all positions at once."""
    like = torch.zeros(1, 1, hidden, dtype=torch.float32)
    cos, sin = rotary(like, torch.arange(positions)[None])
    half = cos.shape[-1] // 2  # both halves are the same
    return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def _vector(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.float32).contiguous()


def _drop(*modules: Any) -> None:
    """Forget packed originals; their pages go at once, not when their whole file is unmapped."""
    for module in modules:
        _discard(module.weight)
        module.weight = None


def _trim() -> None:
    """Give what packing took for a moment back to the system, where malloc would keep it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(ctypes.c_size_t(0))


def _discard(weight: torch.Tensor) -> None:
    """Give the whole pages of a tensor that nobody reads any more back to the system."""
    begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    begin, end = begin + -begin % mmap.PAGESIZE, end - end % mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and begin < end:
        # What it returns does not matter: the memory is freed in any case, only later.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED
        )
