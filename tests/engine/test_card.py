"""The CUDA path on a card that is not there: the CPU's tokens, nothing that CUDA refuses."""

import asyncio
import inspect
import json
import math
import sys
import textwrap
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from unittest import mock

import pytest
import torch

from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model import build, logits_processors, sampling
from serve_app.engine.model.attention import varlen
from serve_app.engine.model.attention.varlen import VarlenBackend, VarlenStep
from serve_app.engine.model.cuda_graphs import GraphedForward
from serve_app.engine.model.loading import load as load_model
from serve_app.engine.model.probe import probe
from serve_app.engine.model.transformers_forward import TransformersForward
from serve_app.engine.sequence import SamplingPlan
from serve_app.errors import EngineError, ModelLoadError, Overloaded
from serve_app.protocol import GenerationRequest, SamplingParams, Structure, TokenPrompt
from tests.engine import card
from tests.engine.card_kernels import prefix_sum
from tests.engine.conftest import random_prompts
from tests.models import VOCAB, make_model

pytestmark = pytest.mark.slow

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
    "one token a row": {"deterministic": True},
    "drafts": {"deterministic": True, "speculative_tokens": 3},
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


@dataclass(eq=False)
class Answer:
    """One completion; two are equal if their logprobs are about the same."""

    ids: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    __hash__ = None

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
    """Return each completion's answer; a machine too busy to compile a structure is asked again."""
    for _ in range(5):
        with suppress(Overloaded):
            return await ask_once(engine, prompt, sampling, n)
        await asyncio.sleep(1)
    raise AssertionError("the engine takes no request")


async def ask_once(engine, prompt, sampling, n):
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


def assert_same(directory, expected, *, attention="varlen", **engine):
    """Ask the engine on the card; it computes from graphs where it can."""
    with card.inserted() as inserted, closing(load(directory, **engine)) as running:
        got = asyncio.run(answers(running))
        assert running.stats().prefix_cache_hits > 0
    assert running.load_report.device == "cuda:0"
    assert running.load_report.attention == attention
    assert (inserted.calls["replay"] > 0) == (attention == "varlen")
    assert got == expected


# The others of their kind differ in what no configuration touches.
FAST = ("llama", "llama-mha-tied", "qwen2", "mistral-window", "gemma3-mixed-window")


@pytest.mark.parametrize(
    ("name", "configuration"),
    [
        pytest.param(name, each, marks=[] if each == "plain" or name in FAST else pytest.mark.slow)
        for name in ARCHITECTURES
        for each in CONFIGURATIONS
    ],
)
def test_card_answers_as_the_cpu(name, configuration, wide_model_dir, expected):
    """Every kind of request at once; nothing is refused, nothing waits while it is recorded."""
    assert_same(
        wide_model_dir(name),
        expected(name),
        attention="sdpa" if name.startswith("gemma2") else "varlen",
        **CONFIGURATIONS[configuration],
    )


@pytest.mark.parametrize("configuration", ["plain", "drafts"])
def test_card_with_a_full_cache_changes_no_answer(configuration, wide_model_dir, monkeypatch):
    """Requests are put back and moved about; what a graph reads follows them."""
    directory = wide_model_dir("llama")
    prompts = random_prompts(8, VOCAB, longest=12)

    def continue_all(engine):
        engine._loop._scheduler._reserve = 4  # places are to grow, so that some are put back
        cases = (Sampled(seed=i % 3, temperature=i % 2, max_tokens=40) for i in range(8))
        return gathered(ask(engine, p, case) for p, case in zip(prompts, cases, strict=True))

    with closing(load(directory, num_gpus=0)) as engine:
        want = asyncio.run(continue_all(engine))
    budget = build._Budget(208 * 3 * 2 * (16 + 16) * 4, "")
    monkeypatch.setattr(build, "_of_gpu", lambda *_: budget)
    with card.inserted(), closing(load(directory, **CONFIGURATIONS[configuration])) as engine:
        got = asyncio.run(continue_all(engine))
        assert engine.stats().preemptions > 0
    assert got == want


async def gathered(tasks):
    return await asyncio.gather(*tasks)


@pytest.mark.parametrize("name", ["llama", "llama-mha-tied"])
def test_cards_of_one_engine_answer_as_one(name, wide_model_dir, expected):
    """The layers are spread by accelerate's own rules; the logits may come from any card."""
    with (
        card.inserted(count=2) as inserted,
        closing(load(wide_model_dir(name), num_gpus=2)) as engine,
    ):
        got = asyncio.run(answers(engine))
    assert inserted.waits["copy cuda to cuda"] > 0
    assert got == expected(name)


@pytest.mark.parametrize(
    ("settings", "chunk", "drafts"),
    [
        ({}, 1024, 0),
        ({"prefill_chunk_tokens": 32}, 32, 0),
        ({"speculative_tokens": 3}, 1024, 0),
        ({"speculative_tokens": 3, "deterministic": True}, 1024, 3),
    ],
    ids=str,
)
def test_card_defaults_suit_it(settings, chunk, drafts, wide_model_dir):
    """Chunks that keep it busy; no guess that takes a decode step off its graphs."""
    with card.inserted(), closing(load(wide_model_dir("llama"), **settings)) as engine:
        assert engine._loop._scheduler._chunk == chunk
        assert engine._loop._scheduler._speculative == drafts


def test_cpu_defaults_suit_it(wide_model_dir):
    """Short chunks, and guesses, which pay there."""
    for native_cpu in (True, False):
        settings = {"speculative_tokens": 3, "native_cpu": native_cpu}
        with closing(load(wide_model_dir("llama"), num_gpus=0, **settings)) as engine:
            assert engine._loop._scheduler._chunk == 256
            assert engine._loop._scheduler._speculative == 3


@pytest.mark.parametrize("count", [1, 2])
def test_card_memory_of_loading_is_no_part_of_a_step(count, wide_model_dir):
    """The peak of a step is its own, on every card."""
    config = ModelConfig(path="/m", dtype="float32")
    with card.inserted(count=count) as inserted:
        loaded = load_model(wide_model_dir("llama"), config, num_gpus=count, num_cpus=1)
        inserted.peak = 60 * card.GIB
        probed = probe(loaded, EngineConfig(max_running_requests=4))
    sampler = 6 * 4 * 4 * VOCAB
    first, *others = (probed.step_bytes[torch.device("cuda", i)] for i in range(count))
    assert first == inserted.step + sampler
    assert others == [inserted.step] * (count - 1)


@pytest.mark.parametrize("others_gib", [0, 16.5, 36])
def test_card_shared_by_replicas(others_gib, wide_model_dir):
    """The second one starts whatever the first holds of its own share."""
    with card.inserted() as inserted:
        inserted.others = int(others_gib * card.GIB)
        with closing(load(wide_model_dir("llama"), num_gpus=0.5)) as engine:
            (answer,) = asyncio.run(ask(engine, [5, 6, 7], Sampled(temperature=0)))
    assert len(answer.ids) == 10


PENALTIES = Sampled(frequency_penalty=0.3, repetition_penalty=1.2, logit_bias=((5, 1.0),))
STRUCTURE = SamplingParams(max_tokens=10, structure=Structure("regex", "[a-z ]{60,90}"))


@pytest.mark.parametrize("sampling_params", [PENALTIES, STRUCTURE], ids=["penalties", "structure"])
def test_card_waits_do_not_grow_with_the_rows(sampling_params, wide_model_dir):
    """What rows do to their logits reaches the card in one copy."""

    def waits(streams):
        asked = [replace(sampling_params, seed=i) for i in range(streams)]
        with card.inserted() as inserted, closing(load(wide_model_dir("llama"))) as engine:
            inserted.waits.clear()
            before = engine.stats().steps
            asyncio.run(gathered(ask(engine, [5, 6, i], each) for i, each in enumerate(asked)))
            return sum(inserted.waits.values()) / (engine.stats().steps - before)

    assert waits(8) < waits(1) + 1.5


def test_card_never_draws_a_banned_token_for_a_lone_row():
    """A card's prefix sum gives ids of probability 0 a share of its rounding in float32."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 4096, generator=generator)
    banned = torch.rand(4096, generator=generator) < 0.75
    logits[:, banned] = -torch.inf
    sums = prefix_sum(logits.softmax(-1), -1)[0]
    # The noises at which float32 sums would draw a banned token.
    gaps = [i for i in range(1, 4096) if banned[i] and sums[i - 1] < sums[i]]
    assert gaps
    noises = {math.ceil(float(sums[i - 1] / sums[-1]) * 2**23) / 2**23 for i in gaps}
    plan = SamplingPlan(seed=0)
    with card.inserted():
        on_card = logits.to("cuda")
        for noise in noises:
            with mock.patch.object(sampling, "uniform", lambda *_, noise=noise: noise):
                (token,) = sampling.sample(on_card, [plan], [0]).tolist()
            assert not banned[token]


# A fault of the CUDA path: where, what stands there, what stands there instead.
FAULTS = {
    "lengths in int64": (GraphedForward._compute, "used[:rows].int()", "used[:rows]"),
    "a wait in a recording": (
        GraphedForward._compute,
        "used = self._inputs\n",
        "used = self._inputs; int(used.max())\n",
    ),
    "ids left on the host": (TransformersForward._tensor, ", device=self._device", ""),
    "noise left on the host": (
        sampling._draw,
        "dtype=dtype,\n        device=device,",
        "dtype=dtype,",
    ),
    "a mask left on the host": (
        logits_processors._banned,
        "torch.from_numpy(rows).to(logits.device)",
        "torch.from_numpy(rows)",
    ),
    "a recorded length that is too short": (
        GraphedForward._compute,
        "max_k=self._decode.window",
        "max_k=self._decode.window // 8",
    ),
    "recorded positions": (
        GraphedForward._compute,
        "positions[:rows]",
        "torch.zeros_like(positions[:rows])",
    ),
    "recorded lengths": (
        GraphedForward._compute,
        "used[:rows].int()",
        "torch.ones_like(used[:rows]).int()",
    ),
    "a window of one more": (VarlenStep.attend, "scoring.window - 1", "scoring.window"),
    "a region of one more": (
        VarlenStep.attend,
        "window, cut = (-1, -1), scoring.window",
        "window, cut = (-1, -1), scoring.window + 1",
    ),
    "a region at its old start": (varlen._ends, "starts[:-1] += ", "starts[:-1] += 0 * "),
    "rows in the cache's order": (
        TransformersForward.logits,
        "each[1].count > 1",
        "0",
    ),
    "logits in the batch's order": (
        TransformersForward.logits,
        "kept[index] = ",
        "kept[len(spans) - 1] = ",
    ),
    "a chunk's queries at their old place": (
        VarlenBackend.begin,
        "span.q_start - count",
        "span.q_start",
    ),
    "moves forgotten": (GraphedForward.move, "self._eager.move(moves)", "pass"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_card_shows_faults(fault, wide_model_dir, expected, monkeypatch):
    """Each of them is refused, waits while it is recorded, or gives another answer."""
    function, old, new = FAULTS[fault]
    break_it(monkeypatch, function, old, new)
    name = "mistral-window" if "window" in fault or "region" in fault else "llama"
    with pytest.raises((AssertionError, EngineError, ModelLoadError)):
        assert_same(wide_model_dir(name), expected(name))


def break_it(monkeypatch, function, old, new):
    """Replace a piece of a function's text for the time of a test."""
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(old) == 1
    module = inspect.getmodule(function)
    made = {}
    exec(compile(text.replace(old, new), function.__qualname__, "exec"), vars(module), made)
    *owner, name = function.__qualname__.split(".")
    users = [m for key, m in sys.modules.items() if key.startswith("serve_app.engine")]
    for user in [getattr(module, owner[0])] if owner else users:
        if getattr(user, name, None) is function:
            monkeypatch.setattr(user, name, made[name])
