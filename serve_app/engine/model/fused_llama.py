"""A Llama-like model in fewer and larger operations, for CUDA.

transformers' forward is some 30 kernels a layer, most of which touch a few rows between two
matrix products: on a fast card they are a quarter of a decode step. Here Q, K and V are one
product, gate and up another, and torch compiles what lies between two products to a kernel or
two. Attention is a call between two compiled functions, which are the same for all layers, so
each is compiled twice: for a single row, and for any number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
import torch
from torch.nn import functional
from transformers.modeling_outputs import CausalLMOutput

from serve_app.engine.model.attention.interface import ForwardPass
from serve_app.engine.model.attention.step import Scoring
from serve_app.engine.model.llama_like import window_of

log = structlog.get_logger()

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Layer:
    index: int
    scoring: Scoring
    before: dict[str, Any]  # arguments of `before_attention` beside the tokens'
    after: dict[str, Any]  # of `after_attention` likewise


class FusedLlama:
    """Computes what the model does, called as the model is.

    Args:
        model: Llama-like, on one device. Its projections become views of the joined ones.
        compile_: turns a function into a faster one, as `torch.compile` does.
    """

    def __init__(self, model: Any, compile_: Function | None = None) -> None:
        base = model.model
        self._model = model
        self._layers = [
            _layer(index, layer, model.config) for index, layer in enumerate(base.layers)
        ]
        self._before, self._after = before_attention, after_attention
        if compile_ is not None:
            self._compile(compile_)

    def parameters(self) -> Any:
        """Return the model's."""
        return self._model.parameters()

    @torch.inference_mode()
    def __call__(
        self,
        *,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        forward_pass: ForwardPass,
        use_cache: bool = False,  # noqa: ARG002 (the forward pass has it)
    ) -> CausalLMOutput:
        """Compute packed tokens.

        Args:
            input_ids: (1, tokens).
            position_ids: (1, tokens).
            logits_to_keep: which tokens need logits, in the order of the result.
            forward_pass: keeps K and V, and attends.
            use_cache: as the model has it; no matter here.

        Returns:
            `logits`, (1, kept, vocabulary).
        """
        base = self._model.model
        residual = base.embed_tokens(input_ids[0])
        cos, sin = (part[0] for part in base.rotary_emb(residual, position_ids))
        update = torch.zeros_like(residual)
        for layer in self._layers:
            residual, query, key, value = self._before(
                *_of_any_rows(update, residual, cos, sin), **layer.before
            )
            attended = forward_pass.attend(layer.index, query, key, value, layer.scoring)
            residual, update = self._after(*_of_any_rows(attended, residual), **layer.after)
        hidden = (residual + update)[logits_to_keep]
        return CausalLMOutput(logits=self._model.lm_head(base.norm(hidden))[None])

    @torch.inference_mode()
    def _compile(self, compile_: Function) -> None:
        """Compile both functions, or stay with the plain ones where that is impossible."""
        self._before, self._after = compile_(before_attention), compile_(after_attention)
        layer = self._layers[0]
        rotary = self._model.model.rotary_emb
        try:
            for rows in (2, 1):
                norm = layer.before["norm"]
                hidden = norm.new_zeros(rows, len(norm))
                places = torch.arange(rows, device=hidden.device)[None]
                cos, sin = (part[0] for part in rotary(hidden, places))
                tokens = _of_any_rows(hidden, hidden.clone(), cos, sin)
                _, query, _, _ = self._before(*tokens, **layer.before)
                self._after(*_of_any_rows(query, hidden), **layer.after)
        except Exception as error:  # noqa: BLE001 (compilers raise anything)
            log.warning("engine.compile_unavailable", reason=str(error).splitlines()[0][:300])
            self._before, self._after = before_attention, after_attention


def compiled_by_torch(function: Function) -> Function:
    """Return a function compiled by torch, in this process: two small ones need no workers."""
    torch._inductor.config.compile_threads = 1
    faster: Function = torch.compile(function)
    return faster


def before_attention(  # noqa: PLR0913 (a layer's tensors, one by one, for the compiler)
    update: torch.Tensor,
    residual: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    norm: torch.Tensor,
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    kv_heads: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute a layer up to its attention.

    Args:
        update: what the layer before adds, (tokens, hidden).
        residual: (tokens, hidden).
        cos: of the rotary embedding, (tokens, head_dim).
        sin: like `cos`.
        norm: (hidden,).
        qkv: the joined projections, (heads * head_dim, hidden), of Q, K and V in this order.
        bias: theirs, or None.
        query_norm: (head_dim,), or None.
        key_norm: like `query_norm`.
        kv_heads: of K and of V.
        eps: of the norms.

    Returns:
        The new residual, and Q, K and V, (tokens, heads, head_dim) each.
    """
    residual = residual + update
    joined = functional.linear(_rms_norm(residual, norm, eps), qkv, bias)
    heads = joined.view(joined.shape[0], -1, cos.shape[-1])
    query, key, value = heads.split((heads.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if query_norm is not None:
        query = _rms_norm(query, query_norm, eps)
    if key_norm is not None:
        key = _rms_norm(key, key_norm, eps)
    return residual, _rotate(query, cos, sin), _rotate(key, cos, sin), value


def after_attention(  # noqa: PLR0913 (likewise)
    attended: torch.Tensor,
    residual: torch.Tensor,
    *,
    out: torch.Tensor,
    norm: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute a layer from its attention on.

    Args:
        attended: (tokens, heads, head_dim).
        residual: (tokens, hidden).
        out: (hidden, heads * head_dim).
        norm: (hidden,).
        gate_up: the joined projections, (2 * intermediate, hidden).
        down: (hidden, intermediate).
        eps: of the norm.

    Returns:
        The new residual, and what the MLP adds to it.
    """
    residual = residual + functional.linear(attended.flatten(1), out)
    gate, up = functional.linear(_rms_norm(residual, norm, eps), gate_up).chunk(2, dim=-1)
    return residual, functional.linear(functional.silu(gate) * up, down)


def _of_any_rows(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Let the compiler know that the first size changes from step to step."""
    for tensor in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return tensors


def _rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = hidden.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(hidden.dtype)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs of numbers, half a head apart, by their position's angle."""
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return heads * cos[:, None] + turned * sin[:, None]


def _layer(index: int, layer: Any, config: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    biases = [part.bias for part in projections]
    return _Layer(
        index=index,
        scoring=Scoring(attention.scaling, window=window_of(attention, config)),
        before={
            "norm": layer.input_layernorm.weight,
            "qkv": _joined(projections),
            "bias": None if biases[0] is None else torch.cat(biases),
            "query_norm": attention.q_norm.weight if hasattr(attention, "q_norm") else None,
            "key_norm": attention.k_norm.weight if hasattr(attention, "k_norm") else None,
            "kv_heads": config.num_key_value_heads,
            "eps": layer.input_layernorm.variance_epsilon,
        },
        after={
            "out": attention.o_proj.weight,
            "norm": layer.post_attention_layernorm.weight,
            "gate_up": _joined((mlp.gate_proj, mlp.up_proj)),
            "down": mlp.down_proj.weight,
            "eps": layer.post_attention_layernorm.variance_epsilon,
        },
    )


def _joined(parts: tuple[Any, ...]) -> torch.Tensor:
    """Return the weights of linear layers one after the other; theirs become views of it."""
    joined = torch.cat([part.weight.detach() for part in parts])
    sizes = [part.weight.shape[0] for part in parts]
    for part, weight in zip(parts, joined.split(sizes), strict=True):
        part.weight = torch.nn.Parameter(weight, requires_grad=False)
    return joined
