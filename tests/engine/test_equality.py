"""The engine's greedy tokens are `generate`'s, in float32, whatever runs beside."""

import asyncio
import random

import pytest

from serve_app.protocol import GenerationRequest, SamplingParams, TokenPrompt
from tests.engine.conftest import GREEDY, Reference, load_engine, random_prompts, run
from tests.models import ARCHITECTURES, VOCAB

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("native_cpu", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_generate_of_32_concurrent_prompts_equals_transformers(
    name, native_cpu, load, model_dir
):
    """Mixed lengths, chunked prefill and a shared batch do not change one token."""
    engine = load(name, max_batch_tokens=48, max_running_requests=12, native_cpu=native_cpu)
    if native_cpu and engine.load_report.attention != "native":
        assert name.startswith(("gemma", "phi", "mixtral")), "it should have been compiled"
        return
    reference = Reference(model_dir(name))
    prompts = random_prompts(32, VOCAB)
    lengths = [4 + index % 21 for index in range(32)]
    results = await asyncio.gather(
        *(
            run(engine, prompt, SamplingParams(temperature=0, max_tokens=n))
            for prompt, n in zip(prompts, lengths, strict=True)
        )
    )
    for prompt, n, (_, ids, _, usage) in zip(prompts, lengths, results, strict=True):
        assert ids == reference.greedy(prompt, n)
        assert usage.prompt_tokens == len(prompt)
    assert len({tuple(ids) for _, ids, _, _ in results}) > 16, "the model says always the same"
    assert engine.stats().kv_tokens_used == 0


@pytest.fixture(scope="module")
def workload(model_dir) -> list[tuple[list[int], list[int]]]:
    """200 prompts, most with one of four beginnings, and what `generate` says to each."""
    chance, reference = random.Random(11), Reference(model_dir("llama"))
    beginnings = [[], *(prompt * 3 for prompt in random_prompts(4, VOCAB, seed=2))]
    prompts = [chance.choice(beginnings) + p for p in random_prompts(200, VOCAB, seed=12)]
    answers = reference.greedy_batch(prompts, 64)
    return [
        (prompt, answer[: chance.randint(1, 64)])
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


@pytest.mark.parametrize("native_cpu", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
async def test_generate_of_200_mixed_requests_equals_transformers(seed, native_cpu, load, workload):
    """Random arrivals, cancels, preemptions, prefix hits, several completions: no other token."""
    chance = random.Random(seed)
    engine = load(
        kv_cache_cpu_gib=0.0005,
        max_batch_tokens=96,
        prefill_chunk_tokens=40,
        max_running_requests=12,
        max_context_tokens=256,
        native_cpu=native_cpu,
        queued=1000,
    )
    engine._loop._scheduler._reserve = 8  # places are to grow, so that some are put back

    async def ask(prompt: list[int], expected: list[int]) -> bool:
        leaves, n = chance.random() < 0.15, chance.randint(1, 2)
        await asyncio.sleep(chance.random())
        sampling = SamplingParams(temperature=0, max_tokens=len(expected))
        request = GenerationRequest("r", TokenPrompt(tuple(prompt)), sampling, n=n)
        ids: list[list[int]] = [[] for _ in range(n)]
        stream = engine.generate(request)
        async for delta in stream:
            ids[delta.index] += delta.token_ids
            if leaves:
                break
        await stream.aclose()
        if leaves:
            return all(some == expected[: len(some)] for some in ids)
        return ids == [expected] * n

    assert all(await asyncio.gather(*(ask(*one) for one in workload)))
    stats = engine.stats()
    assert stats.preemptions > 0, "the cache was never full"
    assert stats.prefix_cache_hits > 2000


async def test_generate_greedy_beside_sampled_equals_transformers(engine, model_dir):
    """Sampled neighbours do not touch a greedy request."""
    reference = Reference(model_dir("llama"))
    prompts = random_prompts(16, VOCAB, seed=3)
    hot = SamplingParams(temperature=1.2, top_p=0.8, top_k=40, max_tokens=24)
    results = await asyncio.gather(
        *(run(engine, prompt, hot if i % 2 else GREEDY) for i, prompt in enumerate(prompts))
    )
    for prompt, (_, ids, _, _) in list(zip(prompts, results, strict=True))[::2]:
        assert ids == reference.greedy(prompt, 16)


async def test_generate_of_the_demo_model_equals_transformers(demo_model_dir):
    """The real model in float32: 32 mixed prompts at once, token for token."""
    engine = load_engine(demo_model_dir, max_context_tokens=512, kv_cache_cpu_gib=0.3)
    try:
        reference = Reference(demo_model_dir)
        prompts = random_prompts(32, engine.vocab_size, longest=48, seed=5)
        lengths = [3 + index % 6 for index in range(32)]
        results = await asyncio.gather(
            *(
                run(engine, prompt, SamplingParams(temperature=0, max_tokens=n))
                for prompt, n in zip(prompts, lengths, strict=True)
            )
        )
        for prompt, n, (_, ids, _, _) in zip(prompts, lengths, results, strict=True):
            assert ids == reference.greedy(prompt, n)
    finally:
        engine.close()
