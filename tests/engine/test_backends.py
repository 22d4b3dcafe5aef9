"""Which engine a replica gets, and what is imported for it."""

import subprocess
import sys

import pytest

from serve_app.config import AppConfig, EngineConfig, ModelConfig, ReplicaConfig
from serve_app.engine import backends
from serve_app.engine.engine import Engine
from serve_app.errors import ModelLoadError

pytestmark = pytest.mark.slow


def test_backends_load_the_builtin_engine_without_vllm(model_dir):
    """It is what a config without a word about it gets."""
    directory = model_dir("llama")
    config = AppConfig(
        model=ModelConfig(path=str(directory), dtype="float32"),
        replica=ReplicaConfig(num_gpus=0),
        engine=EngineConfig(max_context_tokens=512, kv_cache_cpu_gib=0.02),
    )
    engine = backends.load(directory, config)
    engine.close()
    assert type(engine) is Engine


def test_backends_say_that_vllm_is_missing(monkeypatch, tmp_path):
    """In one sentence with the remedy, before anything is read; nothing is known of its names."""
    monkeypatch.setattr(backends, "has_vllm", lambda: False)
    engine = EngineConfig(backend="vllm", vllm={"enforce_eager": True})
    with pytest.raises(ModelLoadError, match=r"not installed on this node; .* serve-app\[vllm\]"):
        backends.load(tmp_path, AppConfig(model=ModelConfig(path="/m"), engine=engine))
    assert not backends.check_vllm_arguments(engine)


def test_vllm_is_imported_by_nobody_else():
    """Neither by the builtin engine nor by what replicas and ingresses import first."""
    modules = "serve_app.engine.engine, serve_app.deployments.server, serve_app.app"
    program = f"import sys, {modules}; assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
