"""The engine on a CUDA device: the fast backend, the same answers, no lost memory."""

import asyncio
from contextlib import closing

import pytest
import torch
from structlog.testing import capture_logs

from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.engine import Engine
from serve_app.engine.model import build as model_build
from serve_app.engine.model.attention.interface import choose_backend
from serve_app.engine.model.attention.sdpa import SdpaBackend
from serve_app.engine.model.attention.step import LayerShape, Scoring, Span
from serve_app.engine.model.attention.varlen import find_flash_attention
from serve_app.engine.model.build import assemble
from serve_app.engine.model.cuda_graphs import CudaRecorder
from serve_app.engine.model.fused_llama import FusedLlama, compiled_by_torch
from serve_app.engine.model.loading import load as load_model
from serve_app.protocol import SamplingParams
from tests.engine import test_card
from tests.engine.conftest import Reference, random_prompts, run
from tests.engine.invariance import assert_invariant
from tests.engine.model import test_fused_llama
from tests.engine.model.test_cuda_graphs import assert_same_steps, build
from tests.models import VOCAB, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MIXED = (Span(0, 1, 3, 900), Span(1, 1, 1300, 1), Span(2, 60, 1000, 60), Span(62, 40, 1100, 170))
DECODE = (Span(0, 1, 3, 900), Span(1, 1, 1000, 33), Span(2, 1, 1100, 1))


@pytest.mark.parametrize("spans", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=str)
def test_flash_attention_is_attention(spans, window, heads):
    """FlashAttention over regions of the pool equals SDPA in float32 within bf16's rounding."""
    generator = torch.Generator().manual_seed(1)
    tokens = sum(span.q_count for span in spans)
    shapes = ((tokens, heads[0], 64), (1400, heads[1], 64), (1400, heads[1], 64))
    query, keys, values = (torch.randn(s, generator=generator).cuda() for s in shapes)
    shape = LayerShape(heads[1], 64, 64, query.device, torch.bfloat16, softcap=False)
    fast = choose_backend([shape])
    assert fast.name == "varlen"
    scoring = Scoring(0.125, window=window)
    half = [t.to(torch.bfloat16) for t in (query, keys, values)]
    out = fast.begin(spans).attend(half[0], half[1], half[2], scoring)
    query, keys, values = (t.float() for t in half)
    expected = SdpaBackend().begin(spans).attend(query, keys, values, scoring)
    torch.testing.assert_close(out.float(), expected, atol=2e-2, rtol=2e-2)


def load(directory, dtype):
    return Engine.load(
        directory,
        model=ModelConfig(path=str(directory), dtype=dtype),
        engine=EngineConfig(max_context_tokens=512, max_batch_tokens=64, kv_cache_fraction=0.5),
        num_gpus=1,
        num_cpus=1,
        api=ApiConfig(max_queued_requests=64),
    )


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2-softcap-window", "mixtral"])
async def test_engine_in_float32_equals_generate(tmp_path, name):
    """Token for token, 32 prompts at once, against the CPU's `generate`."""
    directory = make_model(tmp_path / "m", name)
    reference = Reference(directory)
    prompts = random_prompts(32, VOCAB)
    greedy = SamplingParams(temperature=0, max_tokens=12)
    with closing(load(directory, "float32")) as engine:
        results = await asyncio.gather(*(run(engine, prompt, greedy) for prompt in prompts))
        assert engine.stats().kv_tokens_used == 0
    equal = [
        ids == reference.greedy(p, 12) for p, (_, ids, _, _) in zip(prompts, results, strict=True)
    ]
    assert all(equal)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3-mixed-window"])
def test_engine_in_float32_answers_as_the_cpu(tmp_path, name):
    """Every kind of request at once: sampling, penalties, grammars, scores, several, cached."""
    directory = make_model(tmp_path / "m", name)
    with closing(test_card.load(directory, num_gpus=0)) as engine:
        expected = asyncio.run(test_card.answers(engine))
    with closing(test_card.load(directory)) as engine:
        got = asyncio.run(test_card.answers(engine))
        assert engine.stats().prefix_cache_hits > 0
    assert got == expected


def test_deterministic_answers_in_bfloat16_survive_a_full_cache(tmp_path, monkeypatch):
    """From graphs, put back and moved about: the very tokens of a run with room for all."""
    directory = make_model(tmp_path / "m", "llama", head_dim=16)
    prompts = random_prompts(8, VOCAB, longest=12)
    cases = [test_card.Sampled(seed=i, temperature=i % 2, max_tokens=40) for i in range(8)]

    def answers(preempts):
        config = EngineConfig(deterministic=True, max_context_tokens=256, max_running_requests=8)
        model = ModelConfig(path=str(directory))
        limits = ApiConfig(max_queued_requests=64)
        with closing(
            Engine.load(directory, model=model, engine=config, num_gpus=1, num_cpus=1, api=limits)
        ) as engine:
            assert engine.load_report.attention == "varlen"
            engine._loop._scheduler._reserve = 4  # places are to grow, so that some are put back
            asked = [test_card.ask(engine, p, c) for p, c in zip(prompts, cases, strict=True)]
            found = asyncio.run(test_card.gathered(asked))
            assert (engine.stats().preemptions > 0) == preempts
            return found

    expected = answers(preempts=False)
    budget = model_build._Budget(208 * 3 * 2 * (16 + 16) * 2, "")
    monkeypatch.setattr(model_build, "_of_gpu", lambda *_: budget)
    assert answers(preempts=True) == expected


async def test_engine_in_bfloat16_runs_on_flash_attention(tmp_path):
    """The product's dtype takes the fast backend; the cache's size follows the GPU's memory."""
    directory = make_model(tmp_path / "m", "llama", head_dim=16)
    with closing(load(directory, "bfloat16")) as engine:
        assert engine.load_report.attention == "varlen"
        assert engine.load_report.device.startswith("cuda")
        prompts = random_prompts(16, VOCAB)
        sampled = SamplingParams(max_tokens=20, top_p=0.9, seed=3, ignore_eos=True)
        results = await asyncio.gather(*(run(engine, prompt, sampled) for prompt in prompts))
        assert all(len(ids) == 20 for _, ids, _, _ in results)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral-window"])
def test_fused_llama_compiles_and_computes_what_transformers_does(tmp_path, name):
    """In float32, packed rows of all kinds; one compilation for all numbers of rows above one."""
    directory = make_model(tmp_path / "m", name)
    loaded = load_model(directory, ModelConfig(path="/m", dtype="float32"), num_gpus=1, num_cpus=1)
    expected = test_fused_llama.logits(loaded.model, test_fused_llama.batches())
    torch._dynamo.reset()
    with capture_logs() as logs:
        fused = FusedLlama(loaded.model, compiled_by_torch)
    assert not logs  # it did compile
    torch._dynamo.utils.counters.clear()
    got = test_fused_llama.logits(fused, test_fused_llama.batches())
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for each, want in zip(got, expected, strict=True):
        torch.testing.assert_close(each, want, atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_graphs_compute_what_eager_steps_do(tmp_path):
    """Every number of rows, padded or not, equals SDPA without graphs within bf16's rounding."""
    directory = make_model(tmp_path / "m", "llama", head_dim=16)
    recorder = CudaRecorder(torch.device("cuda:0"))
    attend = find_flash_attention()
    graphed, eager, _ = build(directory, recorder, attend, dtype="bfloat16", num_gpus=1)
    assert_same_steps(graphed, eager, atol=0.1, rtol=0.1)


@torch.inference_mode()
def test_deterministic_steps_are_bitwise_the_same(tmp_path):
    """Alone, then in random batches, chunks and places, from graphs of one size."""
    directory = make_model(tmp_path / "m", "llama", head_dim=16)
    loaded = load_model(directory, ModelConfig(path="/m"), num_gpus=1, num_cpus=1)
    config = EngineConfig(deterministic=True, max_running_requests=16, kv_cache_fraction=0.5)
    assembly = assemble(loaded, config)
    assert assembly.attention == "varlen"
    assert_invariant(assembly.forward, VOCAB, 16)


async def test_record_runs_without_graphs_what_cannot_be_recorded(tmp_path, monkeypatch):
    """A step that waits for the device ends its recording only: the engine loads and answers."""

    def waiting(recorder, compute):
        def compute_and_wait():
            compute()
            torch.cuda.synchronize()

        return record(recorder, compute_and_wait)

    record = CudaRecorder.__call__
    monkeypatch.setattr(CudaRecorder, "__call__", waiting)
    directory = make_model(tmp_path / "m", "llama", head_dim=16)
    with closing(load(directory, "bfloat16")) as engine:
        sampled = SamplingParams(max_tokens=5, seed=3, ignore_eos=True)
        _, ids, _, _ = await run(engine, random_prompts(1, VOCAB)[0], sampled)
        assert len(ids) == 5
