"""The part `engine:` of the config tree."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from serve_app.access_config import Part
from serve_app.config.vllm_arguments import refused


class EngineConfig(Part):
    """How one replica batches, and with which engine."""

    backend: Literal["builtin", "vllm"] = Field(
        "builtin", description="`vllm`: vLLM computes, on nodes that have the extra `vllm`"
    )
    vllm: dict[str, Any] = Field(
        default_factory=dict,
        description="vLLM's engine arguments by their own names, but for those that other keys own",
    )
    max_context_tokens: int = Field(
        8192, ge=16, description="window: prompt and completion together"
    )
    max_batch_tokens: int = Field(
        2048, ge=16, description="tokens computed in one step at the most"
    )
    prefill_chunk_tokens: int | None = Field(
        None, ge=16, description="prompt tokens a step while anybody streams; null: 256, GPU 1,024"
    )
    max_running_requests: int = Field(64, ge=1, description="requests in the batch at the most")
    prefix_cache: bool = Field(
        default=True, description="prompts that begin alike share work, and so their timing"
    )
    kv_cache_fraction: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="of the GPU, or of its share by num_gpus: for weights and KV cache together",
    )
    kv_cache_cpu_gib: float = Field(1.0, gt=0, description="KV cache size on CPU, in GiB")
    native_cpu: bool = Field(
        default=True, description="compiled forward on CPU for Llama-like models; needs a compiler"
    )
    speculative_tokens: int = Field(
        0, ge=0, le=16, description="guesses from the text so far; off where CUDA graphs decode"
    )
    generation_config: Literal["auto", "none"] = Field(
        "auto",
        description="`auto`: sampling defaults of the model's generation_config.json; "
        "`none`: temperature 1, all else off",
    )
    deterministic: bool = Field(
        default=False, description="bitwise the same logits alone and in any batch"
    )
    step_timeout_s: float = Field(
        120, gt=0, description="a step that takes longer hangs, and the replica is replaced"
    )

    @field_validator("vllm")
    @classmethod
    def _owned_by_nobody_else(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, argument in value.items():
            if why := refused(name, argument):
                raise ValueError(f"{name} {why}")
        return value

    @model_validator(mode="after")
    def _goes_to_vllm(self) -> EngineConfig:
        if self.vllm and self.backend != "vllm":
            raise ValueError("vllm is set, but backend is builtin; set backend: vllm, or remove it")
        return self
