"""vLLM's numbers, for our metrics and limits.

What vLLM counts comes with its steps and is as old as the last one; what is open is counted here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

from serve_app.engine.sequence import Sequence
from serve_app.engine.stats import EngineStats


class Counts(StatLoggerBase):
    """What vLLM gives a logger after each step; written on the loop's thread."""

    def __init__(self, *_config: Any) -> None:
        self.steps = 0
        self.running = self.waiting = 0
        self.usage = 0.0
        self.prompt_tokens = self.generation_tokens = self.preemptions = 0
        self.queries = self.hits = 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,  # noqa: ARG002 (vLLM's interface)
        engine_idx: int = 0,  # noqa: ARG002 (the same)
    ) -> None:
        """Take one step's numbers."""
        if scheduler_stats is not None:
            self.steps += 1
            self.running = scheduler_stats.num_running_reqs
            self.waiting = scheduler_stats.num_waiting_reqs
            self.usage = scheduler_stats.kv_cache_usage
            self.queries += scheduler_stats.prefix_cache_stats.queries
            self.hits += scheduler_stats.prefix_cache_stats.hits
        if iteration_stats is not None:
            self.prompt_tokens += iteration_stats.num_prompt_tokens
            self.generation_tokens += iteration_stats.num_generation_tokens
            self.preemptions += iteration_stats.num_preempted_reqs

    def log_engine_initialized(self) -> None:
        """Say nothing; the replica logs its own start."""

    def stats(self, opened: Collection[Sequence], kv_tokens: int) -> EngineStats:
        """Return the present numbers.

        Args:
            opened: sequences that are not over.
            kv_tokens: size of the KV cache in tokens.
        """
        running = min(self.running, len(opened))
        begun = [sequence.limit for sequence in opened if sequence.first_s]
        return EngineStats(
            running=running,
            waiting=len(opened) - running,
            kv_tokens_used=round(self.usage * kv_tokens) if opened else 0,
            kv_tokens_total=kv_tokens,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            generation_tokens=self.generation_tokens,
            preemptions=self.preemptions,
            prefix_cache_queries=self.queries,
            prefix_cache_hits=self.hits,
            waiting_tokens=sum(sequence.limit for sequence in opened) - sum(begun),
            running_tokens=sum(begun),
        )
