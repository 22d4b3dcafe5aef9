"""This product's engine."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from scripts.bench.worker import Run, Setup
from scripts.bench.workload import Request, Stream
from serve_app import __version__
from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.protocol import GenerationRequest, SamplingParams, TokenPrompt


def settings(setup: Setup, _start: str) -> str:
    """Say what is set; all else is its default."""
    return (
        f"serve-app {__version__}, max_running_requests {setup.streams}, max_context_tokens "
        f"{setup.window}, no prefix cache, {setup.threads} threads"
    )


def load(setup: Setup) -> Run:
    """Load the engine as a replica does."""
    dtype = "bfloat16" if setup.dtype == "bfloat16" else "float32"
    engine = Engine.load(
        Path(setup.model_dir),
        model=ModelConfig(path=setup.model_dir, dtype=dtype),
        engine=EngineConfig(
            max_context_tokens=setup.window,
            max_batch_tokens=512 if setup.device == "cpu" else 8192,
            prefill_chunk_tokens=None if setup.device == "cpu" else 2048,
            max_running_requests=setup.streams,
            prefix_cache=False,  # every round has the same prompts
        ),
        num_gpus=0 if setup.device == "cpu" else 1,
        num_cpus=setup.threads,
        api=ApiConfig(max_queued_requests=setup.streams),
    )

    async def one(name: str, request: Request, began: float) -> Stream:
        stream = Stream([], [])
        sampling = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
        asked = GenerationRequest(name, TokenPrompt(tuple(request.prompt)), sampling)
        async for delta in engine.generate(asked):
            stream.ids.extend(delta.token_ids)
            stream.times.extend([time.perf_counter() - began] * len(delta.token_ids))
        return stream

    async def every(requests: list[Request]) -> list[Stream]:
        began = time.perf_counter()
        return await asyncio.gather(*(one(str(i), r, began) for i, r in enumerate(requests)))

    return lambda requests: asyncio.run(every(requests))
