"""Guesses change no token, only the number of steps."""

import asyncio

import pytest

from serve_app.engine.speculative import LENGTHS, PAUSE_TOKENS, Drafter
from serve_app.protocol import FinishReason, SamplingParams, TextPrompt
from tests.engine.conftest import load_engine, random_prompts, run
from tests.models import VOCAB


def test_drafter_guesses_what_followed_the_same_tokens_before():
    """The latest place counts, three tokens before two; nothing seen before is no guess."""
    drafter = Drafter(4)
    drafter.learn(1, 1, 0)
    drafter.learn(2, 2, 0)
    assert drafter.propose([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3], 8) == (4, 5, 9, 2)
    assert drafter.propose([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3, 8], 8) == ()
    assert Drafter(4).propose([5, 5], 0) == ()


def test_drafter_indexes_growing_text_as_it_comes():
    """Piece by piece the same guesses as at once."""
    tokens = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2, 4, 1, 2]
    growing = Drafter(2)
    for end in range(1, len(tokens) + 1):
        fresh = Drafter(2)
        assert growing.propose(tokens[:end], 2) == fresh.propose(tokens[:end], 2)


def test_drafter_widens_with_success_and_pauses_after_failure():
    """Doubled while right, cut where it was wrong, silent for a while when all was wrong."""
    tokens = [7, 8, 9] * 10
    drafter = Drafter(8)
    widths = []
    for _ in range(4):
        widths.append(len(drafter.propose(tokens[:24], 8)))
        drafter.learn(widths[-1], widths[-1], 24)
    assert widths == [1, 2, 3, 3]  # no more than is known of the text
    drafter.learn(3, 1, 24)
    assert len(drafter.propose(tokens[:24], 8)) == 1
    drafter.learn(1, 0, 24)
    assert drafter.propose(tokens[:25], 8) == ()
    assert drafter.propose(tokens[:24] + [7, 8, 9] * 6, 8)
    assert LENGTHS[0] < PAUSE_TOKENS


@pytest.mark.parametrize("native_cpu", [True, False])
async def test_speculation_changes_no_token(load, native_cpu):
    """Greedy and seeded, alone and a few at once, to the limit and to a stop id."""
    sampling = [
        SamplingParams(temperature=0, max_tokens=90, ignore_eos=True),
        SamplingParams(temperature=0.7, seed=3, max_tokens=60, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=90, stop_token_ids=frozenset({11, 12, 13})),
        SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, frequency_penalty=0.5),
        SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logprobs=1),
    ]
    prompts = [part * 6 for part in random_prompts(6, VOCAB, longest=9, seed=2)]
    results, steps = [], []
    for speculative in (0, 4):
        engine = load(native_cpu=native_cpu, speculative_tokens=speculative, prefix_cache=False)
        before = engine.stats().steps
        alone = [
            await run(engine, prompt, params)
            for prompt, params in zip(prompts, sampling, strict=True)
        ]
        together = await asyncio.gather(
            *(run(engine, p, s) for p, s in zip(prompts[:4], sampling[:4], strict=True))
        )
        results.append([(ids, reason) for _, ids, reason, _ in [*alone, *together]])
        steps.append(engine.stats().steps - before)
        assert engine.stats().kv_tokens_used == 0
    assert results[0] == results[1]
    assert results[0][3][1] is FinishReason.LENGTH
    assert steps[1] <= steps[0]


async def test_speculation_gets_along_with_a_small_cache(load):
    """Guesses never reach beyond a sequence's place, also while others are put back."""
    prompts = [part * 4 for part in random_prompts(4, VOCAB, longest=9, seed=6)]
    long = SamplingParams(temperature=0, max_tokens=330, ignore_eos=True)
    results = []
    for speculative in (0, 8):
        engine = load(
            "llama-mha-tied",
            kv_cache_cpu_gib=800 * 1920 / 2**30,
            max_context_tokens=400,
            speculative_tokens=speculative,
        )
        answers = await asyncio.gather(*(run(engine, prompt, long) for prompt in prompts))
        results.append([ids for _, ids, _, _ in answers])
        assert engine.stats().preemptions > 0
    assert results[0] == results[1]


async def test_speculation_of_a_text_that_repeats_takes_far_fewer_steps(demo_model_dir):
    """The real model in its own bfloat16: the same tokens in less than half of the steps."""
    text = "import os\nimport sys\n\ndef main():\n    print('hello')\n\n" * 5
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    results, steps = [], []
    for speculative in (0, 6):
        engine = load_engine(
            demo_model_dir,
            dtype="bfloat16",
            kv_cache_cpu_gib=0.1,
            prefix_cache=False,
            speculative_tokens=speculative,
        )
        try:
            before = engine.stats().steps
            results.append((await run(engine, TextPrompt(text), params))[1])
            steps.append(engine.stats().steps - before)
        finally:
            engine.close()
    assert results[0] == results[1]
    assert steps[1] < 0.5 * steps[0]
