"""What transformers itself offers: `generate` one by one or in a batch, continuous batching."""

from __future__ import annotations

import time
from dataclasses import fields
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.streamers import BaseStreamer

from scripts.bench.worker import Run, Setup
from scripts.bench.workload import Request, Stream


def settings(setup: Setup, start: str) -> str:
    """Say which way of transformers this is."""
    return f"transformers {transformers.__version__}, {start}, {setup.threads} threads"


def one_by_one(setup: Setup) -> Run:
    """`generate` with one request after the other."""
    model = _load(setup)

    def run(requests: list[Request]) -> list[Stream]:
        began = time.perf_counter()
        return [_generate(model, [request], began)[0] for request in requests]

    return run


def static(setup: Setup) -> Run:
    """`generate` with all requests as one batch, padded on the left, until the longest ends."""
    model = _load(setup)
    return lambda requests: _generate(model, requests, time.perf_counter())


def continuous(setup: Setup) -> Run:
    """`ContinuousBatchingManager`; its cache is as large as the requests need on a CPU."""
    model = _load(setup)
    page, names = 32, {field.name for field in fields(ContinuousBatchingConfig)}
    on_cpu = {
        "page_size" if "page_size" in names else "block_size": page,
        "num_blocks": setup.streams * -(-setup.window // page),
        "max_batch_tokens": 512,
    }
    on_cuda = {"max_requests_per_batch": setup.streams}
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(
            **(on_cpu if setup.device == "cpu" else on_cuda)
        ),
    )
    manager.warmup()
    manager.start()
    runs = 0

    def run(requests: list[Request]) -> list[Stream]:
        nonlocal runs
        runs += 1
        began = time.perf_counter()
        streams = {}
        for index, request in enumerate(requests):
            name = f"{runs}-{index}"
            manager.add_request(
                list(request.prompt), name, max_new_tokens=request.max_tokens, streaming=True
            )
            streams[name] = Stream([], [])
        unfinished = len(requests)
        while unfinished:
            output = manager.get_result(timeout=60)
            if output is None:
                raise RuntimeError("continuous batching stopped")
            stream = streams[output.request_id]
            new = output.generated_tokens[len(stream.ids) :]
            stream.ids.extend(new)
            stream.times.extend([time.perf_counter() - began] * len(new))
            unfinished -= output.is_finished()
        return list(streams.values())

    return run


def _load(setup: Setup) -> Any:
    torch.set_num_threads(setup.threads)
    model = AutoModelForCausalLM.from_pretrained(
        setup.model_dir, dtype=getattr(torch, setup.dtype)
    ).to(setup.device)
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # and no end
    return model.eval()


class _Clock(BaseStreamer):
    """Notes when each step's tokens come; the first call has the prompts."""

    def __init__(self, began: float) -> None:
        self.times: list[float] = []
        self._began = began

    def put(self, value: torch.Tensor) -> None:  # noqa: ARG002 (ids are read at the end)
        self.times.append(time.perf_counter() - self._began)

    def end(self) -> None:
        pass


@torch.inference_mode()
def _generate(model: Any, requests: list[Request], began: float) -> list[Stream]:
    longest = max(len(request.prompt) for request in requests)
    padding = [longest - len(request.prompt) for request in requests]
    ids = [[0] * pad + list(r.prompt) for pad, r in zip(padding, requests, strict=True)]
    seen = [[0] * pad + [1] * (longest - pad) for pad in padding]
    clock = _Clock(began)
    out = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        max_new_tokens=max(request.max_tokens for request in requests),
        streamer=clock,
    )
    rows, times = out[:, longest:].tolist(), clock.times[1:]
    return [
        Stream(row[: r.max_tokens], times[: r.max_tokens])
        for row, r in zip(rows, requests, strict=True)
    ]
