"""The engines that are held to the same contract, over the same tiny model in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from serve_app.config import ApiConfig, AppConfig, EngineConfig, ModelConfig, ReplicaConfig
from serve_app.engine import backends
from tests.fakes import FakeEngine
from tests.models import make_model

VLLM = pytest.param(
    "vllm",
    marks=[
        pytest.mark.vllm,
        pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
    ],
)
WINDOW = 512


def load_backend(
    directory: Path,
    backend: str,
    *,
    queued: int = 256,
    queued_tokens: int = 2**20,
    reasoning: str = "none",
    **engine: Any,
) -> Any:
    """Load an engine on the CPU as a replica does, with a small cache."""
    own = {"vllm": {"enforce_eager": True}} if backend == "vllm" else {}
    return backends.load(
        directory,
        AppConfig(
            model=ModelConfig(path=str(directory), dtype="float32", reasoning=reasoning),
            replica=ReplicaConfig(num_gpus=0, num_cpus=2),
            engine=EngineConfig(
                backend=backend,
                **{"max_context_tokens": WINDOW, "kv_cache_cpu_gib": 0.05} | own | engine,
            ),
            api=ApiConfig(max_queued_requests=queued, max_queued_tokens=queued_tokens),
        ),
    )


@pytest.fixture(scope="session")
def directory(tmp_path_factory) -> Path:
    """A tiny Llama, with heads as wide as vLLM's kernels for CPUs want them."""
    made = tmp_path_factory.mktemp("conformance") / "model"
    return make_model(made, hidden_size=128, head_dim=32)


@pytest.fixture(scope="session")
def running(directory) -> Iterator[Callable[[str], Any]]:
    """One engine of each kind for all tests that only ask: vLLM takes a while to start."""
    found: dict[str, Any] = {}
    with ExitStack() as stack:

        def get(kind: str) -> Any:
            if kind == "double":
                return FakeEngine()
            if kind not in found:
                made = load_backend(directory, kind)
                found[kind] = stack.enter_context(closing(made))
            return found[kind]

        yield get


@pytest.fixture(params=["builtin", VLLM, "double"])
def any_engine(request, running) -> Any:
    """Whatever implements the protocol."""
    return running(request.param)


@pytest.fixture(params=["builtin", VLLM])
def model_engine(request, running) -> Any:
    """Those that have a model."""
    return running(request.param)


@pytest.fixture(params=["builtin", VLLM])
def kind(request) -> str:
    """For tests that load their own."""
    return str(request.param)
