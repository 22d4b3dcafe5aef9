"""The config to vLLM's engine arguments; and whether `engine.vllm` names only such.

What has no counterpart there: `native_cpu` is of the builtin engine, and `prefill_chunk_tokens`
counts on GPUs alone, since on CPUs vLLM computes a prompt in one step.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from vllm import AsyncEngineArgs

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.sampling_rules import MAX_LOGPROBS
from serve_app.engine.vllm.adapters import Loras
from serve_app.errors import ConfigError
from serve_app.redaction import sanitise

GUIDANCE = {"backend": "guidance", "disable_any_whitespace": True}
# Splits thoughts at <think> and </think>, which have to be tokens of the model's.
THINK_PARSER = "deepseek_r1"
LOOKUP_TOKENS = 4  # that a guess from the text so far has to continue, at the most


def check_names(arguments: Mapping[str, Any]) -> None:
    """Check that `engine.vllm` names arguments of the vLLM that is installed here.

    Raises:
        ConfigError: one that it does not have; with the nearest that it has.
    """
    known = [each.name for each in fields(AsyncEngineArgs)]
    for name in arguments:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        key = f"args.engine.vllm.{name}"
        raise ConfigError(f"{key}: the vLLM installed here has no such argument{hint}", param=key)


def engine_arguments(  # noqa: PLR0913 - all that vLLM is started with, by keyword
    model_dir: Path,
    model: ModelConfig,
    engine: EngineConfig,
    *,
    num_gpus: float,
    window: int,
    splits_thoughts: bool,
    loras: Loras,
) -> AsyncEngineArgs:
    """Return vLLM's engine arguments for a replica.

    Args:
        model_dir: the weights on this node.
        model: their dtype.
        engine: limits, and `vllm`, which adds to what is made of them.
        num_gpus: N is tensor parallel N; 0 computes on the CPU.
        window: prompt and completion together, in tokens.
        splits_thoughts: structures begin behind the thoughts.
        loras: the adapters that requests may name.

    Raises:
        ConfigError: `engine.vllm` has a name or a value that vLLM does not take.
    """
    check_names(engine.vllm)
    made: dict[str, Any] = {
        "model": str(model_dir),
        "dtype": model.dtype,
        "load_format": "safetensors",
        "trust_remote_code": False,
        "runner": "generate",
        "max_model_len": window,
        "max_num_seqs": engine.max_running_requests,
        "scheduling_policy": "priority",
        "enable_prefix_caching": engine.prefix_cache,
        "generation_config": "vllm",  # defaults are the front end's
        "max_logprobs": MAX_LOGPROBS,
        "logprobs_mode": "raw_logprobs",
        "structured_outputs_config": GUIDANCE
        | ({"reasoning_parser": THINK_PARSER} if splits_thoughts else {}),
        "disable_log_stats": False,
        "enable_log_requests": False,
        **loras.arguments(),
        **(_on_gpus(engine, num_gpus) if num_gpus else _on_cpu(engine, window)),
    }
    if engine.speculative_tokens:
        made["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": engine.speculative_tokens,
            "prompt_lookup_max": LOOKUP_TOKENS,
        }
    try:
        return AsyncEngineArgs(**made | engine.vllm)
    except (TypeError, ValueError) as error:
        words = sanitise(str(error))
        raise ConfigError(f"args.engine.vllm: vLLM does not take it: {words}") from None


def _on_gpus(engine: EngineConfig, num_gpus: float) -> dict[str, Any]:
    made: dict[str, Any] = {
        "max_num_batched_tokens": engine.max_batch_tokens,
        "tensor_parallel_size": max(1, int(num_gpus)),
        "gpu_memory_utilization": engine.kv_cache_fraction * min(1.0, num_gpus),
    }
    if num_gpus > 1:  # in a Ray actor vLLM would ask Ray for more of them
        made["distributed_executor_backend"] = "mp"
    if engine.prefill_chunk_tokens is not None:
        made["long_prefill_token_threshold"] = engine.prefill_chunk_tokens
    return made


def _on_cpu(engine: EngineConfig, window: int) -> dict[str, Any]:
    """Return the arguments of a CPU: there a seeded request in a part of a prompt ends vLLM."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(engine.max_batch_tokens, window),
        "kv_cache_memory_bytes": int(engine.kv_cache_cpu_gib * 2**30),
    }
