"""The seam to transformers: its models call `attend`, which writes and reads our KV cache.

transformers looks the function up by name (`AttentionInterface`) and hands it every keyword
that `model.forward` was given, among them our `forward_pass`. An implementation without a
mask function gets no mask at all (transformers 5.23, `masking_utils`), which is meant: rows
are kept apart by their spans.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import structlog
import torch
from transformers import AttentionInterface

from serve_app.engine.model.attention.sdpa import SdpaBackend
from serve_app.engine.model.attention.step import Backend, LayerShape, Scoring
from serve_app.engine.model.attention.varlen import VarlenBackend, find_flash_attention, supports
from serve_app.errors import ModelLoadError

log = structlog.get_logger()

NAME = "serve_app"


class ForwardPass(Protocol):
    """What a forward does at each attention layer."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        """Keep K and V of the packed tokens, then attend.

        Args:
            layer: the layer's index.
            query: (tokens, heads, key_dim).
            key: (tokens, kv_heads, key_dim).
            value: (tokens, kv_heads, value_dim).
            scoring: the layer's.

        Returns:
            (tokens, heads, value_dim).
        """
        ...


class ShapeProbe:
    """A forward that only looks: it records every layer's shapes and attends to nothing."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scoring: Scoring,
    ) -> torch.Tensor:
        """Record the layer; see `ForwardPass.attend`."""
        self.shapes[layer] = LayerShape(
            kv_heads=key.shape[1],
            key_dim=key.shape[2],
            value_dim=value.shape[2],
            device=key.device,
            dtype=key.dtype,
            softcap=scoring.softcap is not None,
        )
        return query.new_zeros(*query.shape[:2], value.shape[2])


def choose_backend(shapes: Iterable[LayerShape]) -> Backend:
    """Pick the fastest backend that does these layers."""
    if supports(tuple(shapes)):
        if attend := find_flash_attention():
            return VarlenBackend(attend)
        log.warning("engine.varlen_unavailable", torch=torch.__version__)
    return SdpaBackend()


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 (always None, see the module)
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from one layer of a transformers model.

    Args:
        module: the layer; its `layer_idx` names its part of the cache.
        query: (1, heads, tokens, key_dim).
        key: (1, kv_heads, tokens, key_dim).
        value: (1, kv_heads, tokens, value_dim).
        attention_mask: none is made for us.
        **kwargs: the layer's scoring and what `model.forward` was given.

    Returns:
        (1, tokens, heads, value_dim), and no weights.

    Raises:
        ModelLoadError: the layer scores in a way that no backend does; seen while loading.
    """
    if kwargs.get("s_aux") is not None or kwargs.get("position_bias") is not None:
        raise ModelLoadError(
            "This model's attention uses sinks or a position bias, which is not supported."
        )
    scale = kwargs.get("scaling")
    scoring = Scoring(
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        window=kwargs.get("sliding_window"),
        softcap=kwargs.get("softcap"),
    )
    forward_pass: ForwardPass = kwargs["forward_pass"]
    out = forward_pass.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scoring,
    )
    return out.unsqueeze(0), None


AttentionInterface.register(NAME, attend)
