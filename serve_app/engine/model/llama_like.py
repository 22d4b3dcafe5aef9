"""Which models are a Llama in all but their sizes, so that code written for one computes them."""

from __future__ import annotations

from typing import Any

from torch import nn

# Decoder layers of RMSNorm, rotary attention and a SwiGLU MLP, each with a residual, and with
# nothing else between: those whose modeling file in transformers was read against ours.
MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})


def difference(model: Any) -> str | None:
    """Return what a transformers causal LM has that a Llama has not; None if nothing."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return f"{config.model_type} models are not Llama-like enough"
    if config.hidden_act != "silu":
        return f"the activation {config.hidden_act} is not silu"
    layer = model.model.layers[0]
    attention, mlp = layer.self_attn, layer.mlp
    biased = [attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj, model.lm_head]
    if any(type(part) is not nn.Linear or part.bias is not None for part in biased):
        return "it has a bias or a layer of its own where Llama has none"
    return None


def window_of(attention: Any, config: Any) -> int | None:
    """Return the tokens that a query of a layer sees, itself included; None is all.

    Args:
        attention: the layer's.
        config: the model's.
    """
    if config.model_type == "llama":
        return None  # whatever its config says, which may have been a Mistral's
    # Layers that differ from each other hold their own; Mistral's are all as its config says.
    source = attention if hasattr(attention, "sliding_window") else config
    return getattr(source, "sliding_window", None) or None
