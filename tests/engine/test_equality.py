"""The engine's greedy tokens are `generate`'s, in float32, whatever runs beside."""

import asyncio

import pytest

from serve_app.protocol import SamplingParams
from tests.engine.conftest import GREEDY, Reference, load_engine, random_prompts, run
from tests.models import ARCHITECTURES, VOCAB


@pytest.mark.parametrize("native_cpu", [True, False])
@pytest.mark.parametrize("name", ARCHITECTURES)
async def test_32_concurrent_prompts_equal_generate(name, native_cpu, load, model_dir):
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


async def test_greedy_beside_sampled_equals_generate(engine, model_dir):
    """Sampled neighbours do not touch a greedy request."""
    reference = Reference(model_dir("llama"))
    prompts = random_prompts(16, VOCAB, seed=3)
    hot = SamplingParams(temperature=1.2, top_p=0.8, top_k=40, max_tokens=24)
    results = await asyncio.gather(
        *(run(engine, prompt, hot if i % 2 else GREEDY) for i, prompt in enumerate(prompts))
    )
    for prompt, (_, ids, _, _) in list(zip(prompts, results, strict=True))[::2]:
        assert ids == reference.greedy(prompt, 16)


async def test_the_demo_model_equals_generate(demo_model_dir):
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
