"""vLLM's engine arguments that `engine.vllm` does not take, and the keys that say it instead.

What the gate proves and pins (repository, revision, token, code of strangers), what the limits of
the API are made of, and what would load other code or open a port is decided elsewhere. Whether
an argument exists at all is known where vLLM is installed, see `engine/vllm/arguments.py`.
"""

from __future__ import annotations

from typing import Any

# Formats that hold tensors and nothing else; others can run code when they are read.
SAFE_FORMATS = ("safetensors", "fastsafetensors", "runai_streamer")

_MODEL = "belongs to the gate; set model.repo_id, model.path or model.url"
_REVISION = "belongs to the gate, which pins the commit; set model.revision"
_CODE = "would load code that nobody has looked at, and is refused"
_PORT = "would open a connection that nothing here guards, and is refused"
_ONE_NODE = "is not done here: a replica is one node; set replica.num_gpus and max_replicas"
_STRUCTURE = "is set by this package, for the structures of requests; see model.reasoning"
_LOGPROBS = "is set by this package, for the logprobs of the API"

OWNED = {
    "model": _MODEL,
    "model_weights": _MODEL,
    "tokenizer": _MODEL,
    "hf_config_path": _MODEL,
    "config_format": _MODEL,
    "tokenizer_mode": _MODEL,
    "skip_tokenizer_init": _MODEL,
    "model_impl": "belongs to vLLM's own models, which alone are checked here, and is refused",
    "revision": _REVISION,
    "code_revision": _REVISION,
    "tokenizer_revision": _REVISION,
    "hf_token": "belongs to the gate, and vLLM never needs it; see access.token_file",
    "trust_remote_code": _CODE,
    "download_dir": "belongs to the gate: vLLM downloads nothing; see HF_HOME",
    "ignore_patterns": "belongs to the gate, which chooses the files",
    "model_class_overrides": _CODE,
    "worker_cls": _CODE,
    "worker_extension_cls": _CODE,
    "scheduler_cls": _CODE,
    "logits_processors": _CODE,
    "io_processor_plugin": _CODE,
    "reasoning_parser_plugin": _CODE,
    "kv_transfer_config": _PORT,
    "kv_events_config": _PORT,
    "ec_transfer_config": _PORT,
    "weight_transfer_config": _PORT,
    "enable_lora": "is set by model.adapters",
    "default_mm_loras": "belongs to the gate, which proves adapters; set model.adapters",
    "spec_model": "names a model that the gate has not proven, and is refused",
    "served_model_name": "belongs to the API; set model.served_name",
    "dtype": "is set by model.dtype",
    "max_model_len": "is set by engine.max_context_tokens",
    "max_num_seqs": "is set by engine.max_running_requests",
    "scheduling_policy": "is set by this package, for the classes of API keys",
    "max_num_batched_tokens": "is set by engine.max_batch_tokens",
    "enable_prefix_caching": "is set by engine.prefix_cache",
    "gpu_memory_utilization": "is set by engine.kv_cache_fraction",
    "kv_cache_memory_bytes": "is set by engine.kv_cache_cpu_gib, or kv_cache_fraction on GPUs",
    "generation_config": "is set by engine.generation_config",
    "override_generation_config": "is set by engine.generation_config",
    "max_num_queued_reqs": "is set by api.max_queued_requests",
    "max_num_queued_tokens": "is set by api.max_queued_tokens",
    "tensor_parallel_size": "is set by replica.num_gpus",
    "pipeline_parallel_size": _ONE_NODE,
    "data_parallel_size": _ONE_NODE,
    "data_parallel_size_local": _ONE_NODE,
    "data_parallel_address": _ONE_NODE,
    "nnodes": _ONE_NODE,
    "node_rank": _ONE_NODE,
    "master_addr": _ONE_NODE,
    "master_port": _ONE_NODE,
    "device_ids": "belongs to Ray, which hands out the GPUs; set replica.num_gpus",
    "distributed_executor_backend": "is set by this package: processes of the replica's own node",
    "runner": "is set by this package: text is generated",
    "convert": "is set by this package: text is generated",
    "structured_outputs_config": _STRUCTURE,
    "reasoning_parser": _STRUCTURE,
    "max_logprobs": _LOGPROBS,
    "logprobs_mode": _LOGPROBS,
    "stream_interval": "is set by this package, which joins deltas itself",
    "disable_log_stats": "is set by this package, whose metrics are made of them",
    "enable_log_requests": "would log prompts, and is refused",
    "log_config_file": "is set by logging.level",
    "logging_config": "is set by logging.level",
    "log_level": "is set by logging.level",
}


def refused(name: str, argument: Any) -> str | None:
    """Return why `engine.vllm` does not take an argument, as a clause; None if it does.

    Args:
        name: of vLLM's argument.
        argument: its value.
    """
    # The only argument of which a value decides: vLLM's other formats unpickle.
    if name == "load_format":
        if argument in SAFE_FORMATS:
            return None
        return f"must be one of {', '.join(SAFE_FORMATS)}; other formats can run code"
    if name == "speculative_config" and _names_a_model(argument):
        return "names a model that the gate has not proven, and is refused"
    return OWNED.get(name)


def _names_a_model(argument: Any) -> bool:
    # Guesses from the text alone need no second model, so there is nothing to prove.
    named = argument.get("model") if isinstance(argument, dict) else argument
    return named not in (None, "ngram", "[ngram]")
