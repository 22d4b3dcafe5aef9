"""Recognise a Llama-like transformers model and repack its weights for forward.cpp.

A packed matrix is a row of panels of 32 output columns, each (inputs / depth, 32, depth) with
depth 2 for bfloat16 and 1 for float32: what one dot-product instruction reads is side by side.
Compiled code writes them straight from the file's pages, which takes no longer than to read the
file, so nobody keeps packed weights on a disk. Each original is dropped as soon as it is packed, so
loading never holds two copies.
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


def take(library: ctypes.CDLL, model: Any, positions: int) -> Weights:
    """Pack a supported model's weights and empty it.

    Args:
        library: the compiled forward.cpp.
        model: a transformers causal LM on the CPU; unusable afterwards.
        positions: tokens that rotary tables are made for.
    """
    base, config = model.model, model.config
    cos, sin = _rotary(base.rotary_emb, positions, config.hidden_size)
    attention = base.layers[0].self_attn
    windows = [window_of(layer.self_attn, config) or 0 for layer in base.layers]
    tied = model.lm_head.weight.data_ptr() == base.embed_tokens.weight.data_ptr()
    packer = Packer(library)
    head = packer.pack(model.lm_head.weight)
    embedding = None if tied else base.embed_tokens.weight.detach()
    _drop(model.lm_head)
    if tied:
        _drop(base.embed_tokens)
    return Weights(
        layers=tuple(
            _take_layer(layer, window, packer)
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


class Packer:
    """Packs matrices into memory of its own.

    Args:
        library: the compiled forward.cpp.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self._write = library.pack_panels
        self._memory = HugePages()

    def pack(self, *weights: torch.Tensor, by_turns: int = 0) -> torch.Tensor:
        """Return the panels of matrices as one: (outputs, inputs) each, zeros where none is.

        Args:
            weights: their outputs stand one after the other.
            by_turns: how many outputs of each stand before those of the next; 0 is all.
        """
        originals = [weight.detach().contiguous() for weight in weights]
        first = originals[0]
        rows = [_addresses(original) for original in originals]
        if by_turns:
            columns = torch.stack([part.view(-1, by_turns) for part in rows], dim=1).flatten()
        else:
            columns = torch.cat(rows)
        columns = nn.functional.pad(columns, (0, -len(columns) % COLUMNS))
        inputs = first.shape[1]
        packed = self._memory.empty(len(columns) * inputs, first.dtype)
        self._write(
            columns.data_ptr(),
            len(columns) // COLUMNS,
            inputs // DEPTH[first.dtype],
            packed.data_ptr(),
            torch.get_num_threads(),
        )
        return packed


def _addresses(weight: torch.Tensor) -> torch.Tensor:
    """Return where each output's inputs begin; int64."""
    stride = weight.shape[1] * weight.itemsize
    return weight.data_ptr() + stride * torch.arange(len(weight))


def _take_layer(layer: Any, window: int, packer: Packer) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    bias = None
    if projections[0].bias is not None:
        joined = torch.cat([part.bias.detach().float() for part in projections])
        bias = nn.functional.pad(joined, (0, -len(joined) % COLUMNS))
    qkv = packer.pack(*(part.weight for part in projections))
    _drop(*projections)
    out = packer.pack(attention.o_proj.weight)
    _drop(attention.o_proj)
    # A panel holds 16 gate columns and the same 16 up columns, so that it ends with a product.
    gate_up = packer.pack(mlp.gate_proj.weight, mlp.up_proj.weight, by_turns=COLUMNS // 2)
    _drop(mlp.gate_proj, mlp.up_proj)
    down = packer.pack(mlp.down_proj.weight)
    _drop(mlp.down_proj)
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


def _discard(weight: torch.Tensor) -> None:
    """Give the whole pages of a tensor that nobody reads any more back to the system."""
    begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
    begin, end = begin + -begin % mmap.PAGESIZE, end - end % mmap.PAGESIZE
    if hasattr(mmap, "MADV_DONTNEED") and begin < end:
        # What it returns does not matter: the memory is freed in any case, only later.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED
        )
