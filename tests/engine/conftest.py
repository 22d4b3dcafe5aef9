"""Tiny models on disk and engines over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.protocol import (
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenDelta,
    TokenPrompt,
)
from tests.models import make_model

GREEDY = SamplingParams(temperature=0, max_tokens=16)


def load_engine(
    directory: Path,
    *,
    dtype: str = "float32",
    queued: int = 256,
    queued_tokens: int = 2**20,
    **engine: Any,
):
    """Load an engine on the CPU with a small cache."""
    settings = {"max_context_tokens": 512, "kv_cache_cpu_gib": 0.02, **engine}
    return Engine.load(
        directory,
        model=ModelConfig(path=str(directory), dtype=dtype),
        engine=EngineConfig(**settings),
        num_gpus=0,
        num_cpus=2,
        api=ApiConfig(max_queued_requests=queued, max_queued_tokens=queued_tokens),
    )


async def collect(engine: Engine, request: GenerationRequest) -> list[TokenDelta]:
    """Read a stream to its end."""
    return [delta async for delta in engine.generate(request)]


async def run(engine, prompt, sampling: SamplingParams = GREEDY, request_id: str = "r"):
    """Return text, ids, finish reason and the last usage; check what holds for every stream."""
    if isinstance(prompt, list | tuple):
        prompt = TokenPrompt(tuple(prompt))
    deltas = await collect(engine, GenerationRequest(request_id, prompt, sampling))
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert isinstance(deltas[-1].finish_reason, FinishReason)
    ids = [token for delta in deltas for token in delta.token_ids]
    assert deltas[-1].usage.completion_tokens == len(ids)
    text = "".join(delta.text for delta in deltas)
    return text, ids, deltas[-1].finish_reason, deltas[-1].usage


def random_prompts(count: int, vocab: int, *, longest: int = 60, seed: int = 0) -> list[list[int]]:
    """Return prompts of random ids and mixed lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (count,), generator=generator).tolist()
    return [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]


class Reference:
    """What transformers' own `generate` answers, in float32."""

    def __init__(self, directory: Path) -> None:
        config = AutoConfig.from_pretrained(directory)
        # Some versions of transformers (5.17) leave a softcap out of SDPA without a word.
        soft = getattr(config, "attn_logit_softcapping", None)
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager" if soft else None
        )
        self.model.eval()

    def greedy(self, prompt: list[int], max_tokens: int) -> list[int]:
        """Return the sampled ids of one prompt, alone."""
        ids = torch.tensor([prompt])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
        return out[0, len(prompt) :].tolist()

    def greedy_batch(self, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Return the sampled ids of many prompts, padded to one batch; an end of 0 is the last."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        lengths = torch.tensor([[len(prompt)] for prompt in prompts])
        mask = (torch.arange(width) >= width - lengths).long()
        out = self.model.generate(
            ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False
        )
        answers = out[:, width:].tolist()
        return [ids[: ids.index(0) + 1] if 0 in ids else ids for ids in answers]


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a tiny model once a session and return its directory."""
    base = tmp_path_factory.mktemp("models")

    def get(name: str = "llama") -> Path:
        directory = base / name
        return directory if directory.exists() else make_model(directory, name)

    return get


@pytest.fixture
def load(model_dir) -> Iterator[Callable[..., Engine]]:
    """Load engines that are closed at the test's end."""
    with ExitStack() as stack:
        yield lambda name="llama", **settings: stack.enter_context(
            closing(load_engine(model_dir(name), **settings))
        )


@pytest.fixture(scope="module")
def engine(model_dir) -> Iterator[Engine]:
    """One engine over a tiny Llama for the tests that only ask."""
    with closing(load_engine(model_dir("llama"))) as running:
        yield running


async def drained(engine, within_s=10.0):
    """Wait until nothing runs and return the numbers of that moment."""
    deadline = time.monotonic() + within_s
    while (stats := engine.stats()).running or stats.waiting:
        assert time.monotonic() < deadline, stats
        await asyncio.sleep(0.005)
    return stats
