"""A loaded model's cache, window and forward."""

import re
from types import SimpleNamespace

import pytest
import torch

from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine import engine
from serve_app.engine.model import build
from serve_app.engine.model.attention.step import LayerShape
from serve_app.engine.model.batch_invariant import FixedForward
from serve_app.engine.model.loading import load
from serve_app.engine.model.native import library
from serve_app.engine.model.probe import Probed
from serve_app.errors import ModelLoadError
from tests.models import WINDOW

# Bytes of K and V of one token of the tiny Llama in float32: 3 layers, 2 heads of 8 and 8,
# where the native cache pads values to whole panels of 32.
GENERAL, NATIVE = 3 * 2 * (8 + 8) * 4, 3 * 2 * (8 + 32) * 4


def assemble(directory, *, name="llama", **changes):
    settings = {"kv_cache_cpu_gib": 0.01, **changes}
    loaded = load(directory(name), ModelConfig(path="/m", dtype="float32"), num_gpus=0, num_cpus=2)
    return build.assemble(loaded, EngineConfig(**settings))


@pytest.mark.parametrize(("native_cpu", "per_token"), [(True, NATIVE), (False, GENERAL)])
def test_window_is_the_least_of_three(model_dir, native_cpu, per_token):
    """Configured, trained, or what the cache can hold in whole blocks."""

    def window(**engine):
        return assemble(model_dir, native_cpu=native_cpu, **engine).max_context_tokens

    assert window(max_context_tokens=100) == 100
    assert window(max_context_tokens=8192) == WINDOW
    assert window(kv_cache_cpu_gib=70 * per_token / 2**30) == 64
    with pytest.raises(ModelLoadError, match="kv_cache_cpu_gib"):
        window(kv_cache_cpu_gib=1e-9)


@pytest.mark.parametrize(("native_cpu", "per_token"), [(True, NATIVE), (False, GENERAL)])
def test_assemble_makes_no_larger_cache_than_the_batch_can_use(model_dir, native_cpu, per_token):
    """Memory beyond window times requests would never be touched."""
    made = assemble(model_dir, native_cpu=native_cpu, max_running_requests=2, kv_cache_cpu_gib=1)
    assert made.kv_tokens == 2 * WINDOW
    assert made.kv_bytes == made.kv_tokens * per_token


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "native"), ("qwen3", "native"), ("gemma2-softcap-window", "sdpa")],
)
def test_assemble_compiles_llama_like_models(model_dir, name, attention):
    """Others run transformers' own forward."""
    assert assemble(model_dir, name=name).attention == attention


def test_assemble_runs_the_general_forward_without_a_compiler(model_dir, monkeypatch):
    """The log says why; the deterministic steps are then those of the general forward."""

    def refuse():
        raise library.Unavailable("no C++ compiler was found")

    monkeypatch.setattr(library, "load", refuse)
    assert assemble(model_dir).attention == "sdpa"
    assert isinstance(assemble(model_dir, deterministic=True).forward, FixedForward)


def test_assemble_keeps_no_second_copy_of_packed_weights(model_dir):
    """The transformers model is empty afterwards, but for what is used as it is."""
    loaded = load(model_dir("llama"), ModelConfig(path="/m"), num_gpus=0, num_cpus=2)
    before = sum(p.numel() for p in loaded.model.parameters())
    build.assemble(loaded, EngineConfig(kv_cache_cpu_gib=0.01))
    left = sum(p.numel() for p in loaded.model.parameters())
    assert left < before / 2
    assert torch.is_tensor(loaded.model.model.norm.weight)


GIB = 2**30
SHAPE = LayerShape(
    kv_heads=8,
    key_dim=128,
    value_dim=128,
    device=torch.device("cuda:0"),
    dtype=torch.bfloat16,
    softcap=False,
)


class Card:
    """A GPU of 80 GiB, as torch and the driver report it; sizes in GiB."""

    total = 80.0

    def __init__(self, monkeypatch):
        self.others = 0.0
        self.weights = 0.0
        self.context = 0.5
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: self.reported())
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: int(self.weights * GIB))

    def reported(self):
        free = self.total - self.others - self.weights - self.context
        return int(free * GIB), int(self.total * GIB)

    def budget(self, *, num_gpus=1.0, step=1.0, fraction=0.9):
        engine = EngineConfig(kv_cache_fraction=fraction)
        (budget,) = build._budgets(
            Probed({0: SHAPE}, {SHAPE.device: int(step * GIB)}), engine, num_gpus
        ).values()
        return budget

    def gib(self, **how):
        return self.budget(**how).size / GIB


@pytest.fixture
def card(monkeypatch):
    return Card(monkeypatch)


def test_budget_of_a_whole_gpu_is_what_the_fraction_leaves(card):
    """Less the weights, the largest step, and what anybody else holds."""
    card.weights = 16
    assert card.gib() == pytest.approx(72 - 16 - 0.5 - 1)
    card.others = 10
    assert card.gib() == pytest.approx(72 - 16 - 0.5 - 1 - 10)


@pytest.mark.parametrize("shares", [(0.45, 0.45), (0.5, 0.5), (0.25, 0.25, 0.25, 0.25), (0.7, 0.3)])
@pytest.mark.parametrize("weights", [2.5, 4.0])
def test_budget_of_replicas_that_share_a_gpu_is_a_share_each(card, shares, weights):
    """Whoever comes first; all of them together leave what the fraction leaves."""
    card.weights = weights
    held = []
    for share in shares:
        budget = card.gib(num_gpus=share)
        assert budget == pytest.approx(0.9 * share * 80 - weights - 0.5 - 1)
        held.append(weights + 0.5 + budget)
        card.others = sum(held)
    assert sum(held) + len(shares) <= 0.9 * 80  # a step each


def test_budget_of_replicas_that_start_together_counts_no_ones_memory_as_free(card):
    """Both see the same free bytes; each is held to its share."""
    card.weights = 16
    card.others = 16.5  # the other one has loaded its weights and has no cache yet
    first = second = card.gib(num_gpus=0.5)
    assert first == pytest.approx(0.9 * 40 - 16 - 0.5 - 1)
    assert 2 * (16 + 0.5 + 1) + first + second <= 80


def test_budget_is_less_for_who_holds_more_than_a_share(card):
    """Free memory is a limit too, and the words name it."""
    card.weights, card.others = 16, 55
    budget = card.budget(num_gpus=0.5)
    assert budget.size / GIB == pytest.approx(8.5 - 0.1 * 40 - 1)
    assert re.match(r"8\.5 of 80\.0 GiB of the GPU are free, .* others hold 55\.0", budget.advice)
    assert "stop them" in budget.advice


@pytest.mark.parametrize(
    ("num_gpus", "weights", "words"),
    [
        (0.25, 20, "replica.num_gpus 0.25 is 18.0 of the GPU's 80.0 GiB"),
        (1, 75, "replica.num_gpus 1 is 72.0 of the GPU's 80.0 GiB"),
    ],
)
def test_budget_of_a_share_that_is_too_small_says_what_to_raise(card, num_gpus, weights, words):
    """And never to raise what is not the limit."""
    card.weights = weights
    budget = card.budget(num_gpus=num_gpus)
    assert budget.size < 0
    assert words in budget.advice
    assert ("raise replica.num_gpus or" in budget.advice) == (num_gpus < 1)
    assert "stop" not in budget.advice
    with pytest.raises(ModelLoadError, match="No memory is left for the KV cache; engine"):
        build._sizes(-1, SimpleNamespace(window=100), EngineConfig(), budget.advice)


def test_budget_of_an_estimate_that_is_off_blames_nobody(card):
    """A CUDA context a little larger than assumed is not another process."""
    card.weights, card.context = 75, 0.8
    assert "others" not in card.budget().advice
    assert card.gib() == pytest.approx(72 - 75 - 0.8 - 1)


def test_budget_has_the_replicas_share(model_dir, monkeypatch):
    """From the engine's num_gpus on."""
    asked = []
    real = build._budgets

    def budgets(probed, engine, num_gpus):
        asked.append(num_gpus)
        return real(probed, engine, num_gpus)

    monkeypatch.setattr(build, "_budgets", budgets)
    loaded = load(model_dir("llama"), ModelConfig(path="/m"), num_gpus=0, num_cpus=1)
    monkeypatch.setattr(engine, "load", lambda *_, **__: loaded)  # as if there were a GPU
    engine.Engine.load(
        model_dir("llama"),
        model=ModelConfig(path="/m"),
        engine=EngineConfig(native_cpu=False, kv_cache_cpu_gib=0.01),
        num_gpus=0.45,
        num_cpus=1,
        api=ApiConfig(),
    ).close()
    assert asked == [0.45]


def test_budget_of_two_gpus_is_two_whole_ones(card):
    """A share is of one GPU."""
    card.weights = 16
    assert card.gib(num_gpus=2) == card.gib(num_gpus=1)
