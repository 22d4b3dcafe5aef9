"""What the machine can do, measured in turns with the contenders: read, copy and multiply."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.bench.worker import Run, Setup
from scripts.bench.workload import Request

POOL_BYTES = 2**29  # far above any cache
ROWS = 2048


def settings(_setup: Setup, _start: str) -> str:
    """Say what is measured."""
    return "what the machine reads, copies and multiplies"


def load(setup: Setup) -> Run:
    """Count the model's weights and prepare the three measurements."""
    torch.set_num_threads(setup.threads)
    config = AutoConfig.from_pretrained(setup.model_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    dtype, text = getattr(torch, setup.dtype), config.get_text_config()
    head = text.vocab_size * text.hidden_size
    # An untied embedding is looked up, not read; a tied one is the head as well.
    body = sum(p.numel() for p in model.parameters()) - head * (2 - text.tie_word_embeddings)
    heads = getattr(text, "num_key_value_heads", text.num_attention_heads)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_token = text.num_hidden_layers * 2 * heads * head_dim * dtype.itemsize
    pool = torch.ones(POOL_BYTES // 4, device=setup.device)
    other = torch.empty_like(pool)
    rows = torch.randn(ROWS, text.hidden_size, device=setup.device).to(dtype)
    weight = torch.randn(text.intermediate_size, text.hidden_size, device=setup.device).to(dtype)

    @torch.inference_mode()
    def run(_: list[Request]) -> dict[str, float]:
        return {
            "body_parameters": body,
            "head_parameters": head,
            "weights_bytes": (body + head) * dtype.itemsize,
            "kv_bytes_per_token": kv_token,
            "read_bytes_per_s": POOL_BYTES / _fastest(pool.sum, setup.device),
            "copy_bytes_per_s": 2 * POOL_BYTES / _fastest(lambda: other.copy_(pool), setup.device),
            "flop_per_s": 2
            * ROWS
            * weight.numel()
            / _fastest(lambda: torch.nn.functional.linear(rows, weight), setup.device),
        }

    return run


def _fastest(do: Callable[[], object], device: str) -> float:
    """Return the seconds of the fastest of ten; slower ones were disturbed."""
    times = []
    for _ in range(10):
        began = time.perf_counter()
        do()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)
