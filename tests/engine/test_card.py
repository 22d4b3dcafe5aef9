"""The CUDA path on a card that is not there: the CPU's tokens, nothing that CUDA refuses."""

import asyncio
import json
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import pytest

from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.protocol import GenerationRequest, SamplingParams, Structure, TokenPrompt
from tests.engine import card
from tests.engine.conftest import random_prompts
from tests.models import VOCAB, make_model

Sampled = partial(SamplingParams, ignore_eos=True, max_tokens=10)
OBJECT = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
CASES = {
    "greedy": Sampled(temperature=0),
    "sampled": Sampled(seed=1),
    "nucleus": Sampled(seed=2, top_p=0.9),
    "top_k, min_p": Sampled(seed=3, top_k=5, min_p=0.05),
    "penalties": Sampled(seed=4, frequency_penalty=0.5, presence_penalty=0.3),
    "repetition, bias": Sampled(seed=5, repetition_penalty=1.3, logit_bias=((5, 3.0), (9, -100.0))),
    "min_tokens": Sampled(seed=6, min_tokens=4, logprobs=3, ignore_eos=False),
    "prompt logprobs": Sampled(temperature=0, prompt_logprobs=2, logprobs=0),
    "regex": SamplingParams(
        seed=7, max_tokens=30, structure=Structure("regex", "[a-z]{3,8} [0-9]{2}")
    ),
    "json": SamplingParams(
        seed=9, max_tokens=30, structure=Structure("json_schema", json.dumps(OBJECT)), logprobs=2
    ),
    "stop": Sampled(temperature=0, stop=("e",)),
}
CONFIGURATIONS = {
    "plain": {},
    "drafts": {"speculative_tokens": 3},
    "deterministic": {"deterministic": True},
    "chunks": {"max_running_requests": 5, "max_batch_tokens": 16},
}
# Mixtral cannot run here: its experts count tokens by a histogram that CPUs lack for integers.
ARCHITECTURES = (
    "llama",
    "llama-rope-scaled",
    "llama-mha-tied",
    "qwen2",
    "qwen3",
    "mistral-window",
    "gemma2-softcap-window",
    "gemma3-mixed-window",
    "phi3",
)


@pytest.fixture(scope="module")
def wide_model_dir(tmp_path_factory):
    """Tiny models whose heads FlashAttention takes: a multiple of 8."""
    base = tmp_path_factory.mktemp("wide")

    def get(name):
        directory = base / name
        return directory if directory.exists() else make_model(directory, name, head_dim=16)

    return get


@dataclass
class Answer:
    """One completion; two are equal if their logprobs are about the same."""

    ids: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __eq__(self, other):
        same = (self.ids, self.scored) == (other.ids, other.scored)
        return same and self.logprobs == pytest.approx(other.logprobs, abs=2e-3)


def load(directory, *, num_gpus=1.0, **engine):
    settings = {
        "max_context_tokens": 256,
        "max_batch_tokens": 64,
        "max_running_requests": 8,
        "native_cpu": False,
        "kv_cache_cpu_gib": 0.02,
        **engine,
    }
    return Engine.load(
        directory,
        model=ModelConfig(path=str(directory), dtype="float32"),
        engine=EngineConfig(**settings),
        num_gpus=num_gpus,
        num_cpus=1,
        api=ApiConfig(max_queued_requests=64),
    )


async def ask(engine, prompt, sampling, n=1):
    """Return each completion's ids, and the ids and logprobs that were asked for."""
    request = GenerationRequest("r", TokenPrompt(tuple(prompt)), sampling, n=n)
    answers = [Answer() for _ in range(n)]
    async for delta in engine.generate(request):
        answer = answers[delta.index]
        answer.ids += delta.token_ids
        for each in (*delta.prompt_logprobs, *delta.logprobs):
            if each.chosen is not None:
                answer.scored.append(each.chosen.token_id)
                answer.logprobs.append(each.chosen.logprob)
    return answers


async def answers(engine):
    """Ask for everything at once, then again for what is cached."""
    prompts = random_prompts(len(CASES), VOCAB, longest=120)
    shared = (prompts[3] * 3)[:100]
    asked = [
        ask(engine, prompt, case) for prompt, case in zip(prompts, CASES.values(), strict=True)
    ]
    *found, several = await asyncio.gather(*asked, ask(engine, shared, Sampled(seed=11), n=3))
    found += [several, await ask(engine, [*shared, 7], Sampled(seed=12))]
    return dict(zip([*CASES, "n", "prefix hit"], found, strict=True))


@pytest.fixture(scope="module")
def expected(wide_model_dir):
    """What the CPU answers, by architecture; configurations change nothing of it."""
    known = {}

    def get(name):
        if name not in known:
            with closing(load(wide_model_dir(name), num_gpus=0)) as engine:
                known[name] = asyncio.run(answers(engine))
        return known[name]

    return get


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_cards_answers_are_the_cpus(name, configuration, wide_model_dir, expected):
    """Every kind of request at once; nothing is refused, nothing waits while it is recorded."""
    made = card.Graph.made
    with (
        card.inserted() as inserted,
        closing(load(wide_model_dir(name), **CONFIGURATIONS[configuration])) as engine,
    ):
        got = asyncio.run(answers(engine))
        report = engine.load_report
        assert engine.stats().prefix_cache_hits > 0
    assert report.device == "cuda:0"
    assert report.attention == ("sdpa" if name.startswith("gemma2") else "varlen")
    if report.attention == "varlen":
        assert card.Graph.made > made
        assert inserted.calls["replay"] > 0
    assert got == expected(name)
