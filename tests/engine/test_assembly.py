"""A loaded model's cache, window and forward."""

import pytest
import torch

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine import assembly
from serve_app.engine.fixed import FixedForward
from serve_app.engine.loading import load
from serve_app.engine.native import library
from serve_app.errors import ModelLoadError
from tests.models import WINDOW

# Bytes of K and V of one token of the tiny Llama in float32: 3 layers, 2 heads of 8 and 8,
# where the native cache pads values to whole panels of 32.
GENERAL, NATIVE = 3 * 2 * (8 + 8) * 4, 3 * 2 * (8 + 32) * 4


def assemble(directory, *, name="llama", **engine):
    settings = {"kv_cache_cpu_gib": 0.01, **engine}
    loaded = load(directory(name), ModelConfig(path="/m", dtype="float32"), num_gpus=0, num_cpus=2)
    return assembly.assemble(loaded, EngineConfig(**settings))


@pytest.mark.parametrize(("native_cpu", "per_token"), [(True, NATIVE), (False, GENERAL)])
def test_the_window_is_the_least_of_three(model_dir, native_cpu, per_token):
    """Configured, trained, or what the cache can hold in whole blocks."""

    def window(**engine):
        return assemble(model_dir, native_cpu=native_cpu, **engine).max_context_tokens

    assert window(max_context_tokens=100) == 100
    assert window(max_context_tokens=8192) == WINDOW
    assert window(kv_cache_cpu_gib=70 * per_token / 2**30) == 64
    with pytest.raises(ModelLoadError, match="kv_cache_cpu_gib"):
        window(kv_cache_cpu_gib=1e-9)


@pytest.mark.parametrize(("native_cpu", "per_token"), [(True, NATIVE), (False, GENERAL)])
def test_the_cache_is_not_larger_than_the_batch_can_use(model_dir, native_cpu, per_token):
    """Memory beyond window times requests would never be touched."""
    made = assemble(model_dir, native_cpu=native_cpu, max_running_requests=2, kv_cache_cpu_gib=1)
    assert made.kv_tokens == 2 * WINDOW
    assert made.kv_bytes == made.kv_tokens * per_token


@pytest.mark.parametrize(
    ("name", "attention"),
    [("llama", "native"), ("qwen3", "native"), ("gemma2-softcap-window", "sdpa")],
)
def test_llama_like_models_are_compiled(model_dir, name, attention):
    """Others run transformers' own forward."""
    assert assemble(model_dir, name=name).attention == attention


def test_without_a_compiler_the_general_forward_runs(model_dir, monkeypatch):
    """The log says why; the deterministic steps are then those of the general forward."""

    def refuse():
        raise library.Unavailable("no C++ compiler was found")

    monkeypatch.setattr(library, "load", refuse)
    assert assemble(model_dir).attention == "sdpa"
    assert isinstance(assemble(model_dir, deterministic=True).forward, FixedForward)


def test_packing_keeps_no_second_copy(model_dir):
    """The transformers model is empty afterwards, but for what is used as it is."""
    loaded = load(model_dir("llama"), ModelConfig(path="/m"), num_gpus=0, num_cpus=2)
    before = sum(p.numel() for p in loaded.model.parameters())
    assembly.assemble(loaded, EngineConfig(kv_cache_cpu_gib=0.01))
    left = sum(p.numel() for p in loaded.model.parameters())
    assert left < before / 2
    assert torch.is_tensor(loaded.model.model.norm.weight)
