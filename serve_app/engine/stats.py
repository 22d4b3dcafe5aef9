"""Plain numbers about an engine, safe to import without torch."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A moment of one engine.

    Args:
        running: requests that hold a place in the KV cache.
        waiting: requests that do not yet, or not any more.
        kv_tokens_used: tokens of the KV cache that are reserved by them.
        kv_tokens_total: its size in tokens.
        steps: forward passes since the start.
        prompt_tokens: prompt tokens computed since the start.
        generation_tokens: tokens sampled since the start.
        preemptions: requests put back because the cache was full, since the start.
        kv_tokens_cached: tokens of the KV cache kept for others, in room that nobody needs.
        prefix_cache_queries: prompt tokens looked up in the prefix cache since the start.
        prefix_cache_hits: those of them that were found.
        waiting_tokens: what the waiting requests can come to, prompt and completion.
        running_tokens: the same of the running ones.
    """

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    steps: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    kv_tokens_cached: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    waiting_tokens: int = 0
    running_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading took; seconds are wall clock, phases do not overlap.

    Args:
        device: where the first layer lives, `cpu` or `cuda:0`.
        dtype: of every parameter.
        attention: the backend's name.
        weights_bytes: size of all parameters.
        kv_bytes: size of the KV cache.
        kv_tokens: tokens that fit the KV cache.
        tokenizer_s: the tokenizer, from disk.
        weights_s: the weights, from disk to device.
        assemble_s: packing the weights or measuring a forward, and allocating the KV cache.
        graphs_s: recording the decode steps as CUDA graphs.
        warm_up_s: the sanity generation.
        peak_rss: the most memory of the process in bytes up to the end of `load` (weights and
            tokenizer), `assemble` and `warm_up`; pages of the weights' files count.
    """

    device: str
    dtype: str
    attention: str
    weights_bytes: int
    kv_bytes: int
    kv_tokens: int
    tokenizer_s: float
    weights_s: float
    assemble_s: float
    graphs_s: float
    warm_up_s: float
    peak_rss: Mapping[str, int]

    @property
    def total_s(self) -> float:
        """All phases together."""
        return sum(self.phases().values())

    def phases(self) -> dict[str, float]:
        """Return the seconds by phase, in the order in which they come."""
        return {
            "weights": self.weights_s,
            "tokenizer": self.tokenizer_s,
            "assemble": self.assemble_s,
            "graphs": self.graphs_s,
            "warm_up": self.warm_up_s,
        }

    def facts(self) -> dict[str, str | int | float]:
        """Return flat keywords for one log line."""
        return {
            "device": self.device,
            "dtype": self.dtype,
            "attention": self.attention,
            "weights_bytes": self.weights_bytes,
            "kv_bytes": self.kv_bytes,
            "kv_tokens": self.kv_tokens,
            "load_s": round(self.total_s, 3),
            "tokenizer_s": round(self.tokenizer_s, 3),
            "weights_s": round(self.weights_s, 3),
            "assemble_s": round(self.assemble_s, 3),
            "graphs_s": round(self.graphs_s, 3),
            "warm_up_s": round(self.warm_up_s, 3),
            **{f"peak_rss_{phase}_bytes": peak for phase, peak in self.peak_rss.items()},
        }


def peak_rss_bytes() -> int:
    """Return the most memory that this process had, in bytes; Linux counts in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
