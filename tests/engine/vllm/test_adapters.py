"""Adapters under vLLM compute what the merged model computes."""

import json
from contextlib import closing
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve_app.config import AppConfig
from serve_app.engine import backends
from serve_app.errors import ModelLoadError, ModelNotFound
from serve_app.protocol import GenerationRequest, SamplingParams, TokenPrompt
from tests.access.cases import ADAPTER_CONFIG
from tests.models import make_model

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]
RANK, ALPHA = 12, 48
PROMPT = tuple(range(20, 40))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny Llama, with heads as wide as vLLM's kernels for CPUs want them."""
    made = tmp_path_factory.mktemp("base") / "model"
    return make_model(made, hidden_size=128, head_dim=32)


def make_adapter(base, directory, seed):
    """Write an adapter of random matrices, and the model that it is merged into."""
    torch.manual_seed(seed)
    weights, tensors = load_file(base / "model.safetensors"), {}
    for name in [name for name in weights if "q_proj" in name or "down_proj" in name]:
        out, into = weights[name].shape
        a, b = torch.randn(RANK, into) * 0.3, torch.randn(out, RANK) * 0.3
        module = "base_model.model." + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        weights[name] = (weights[name].float() + ALPHA / RANK * b @ a).to(weights[name].dtype)
    adapter, merged = directory / "adapter", directory / "merged"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG | config))
    merged.mkdir()
    for path in base.iterdir():
        (merged / path.name).write_bytes(path.read_bytes())
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    return adapter, merged


def load(directory, backend, adapters=None):
    named = [{"name": name, "repo_id": f"acme/{name}"} for name in adapters or ()]
    own = {"vllm": {"enforce_eager": True}} if backend == "vllm" else {}
    config = {
        "model": {"path": str(directory), "dtype": "float32", "adapters": named},
        "replica": {"num_gpus": 0, "num_cpus": 2},
        "engine": {
            "backend": backend, "max_context_tokens": 256, "kv_cache_cpu_gib": 0.05, **own,
        },
    }  # fmt: skip
    return backends.load(directory, AppConfig.model_validate(config), adapters)


async def greedy(engine, adapter="", request_id="x"):
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    request = GenerationRequest(request_id, TokenPrompt(PROMPT), params, adapter=adapter)
    return "".join([delta.text async for delta in engine.generate(request)])


async def test_adapters_answer_as_their_merged_models(base, tmp_path):
    """Two at once, beside the model itself; a name that is not there is refused."""
    wanted, adapters = {}, {}
    with closing(load(base, "builtin")) as engine:
        wanted[""] = await greedy(engine)
    for seed, name in enumerate(("x", "y")):
        (tmp_path / name).mkdir()
        adapters[name], merged = make_adapter(base, tmp_path / name, seed)
        with closing(load(merged, "builtin")) as engine:
            wanted[name] = await greedy(engine)
    assert len(set(wanted.values())) == 3
    with closing(load(base, "vllm", adapters)) as engine:
        for _ in range(2):  # the second time with a cached beginning, which is each one's own
            for name, text in wanted.items():
                assert await greedy(engine, name) == text
        with pytest.raises(ModelNotFound):
            await greedy(engine, "z")


def test_adapters_for_another_model_are_refused(base, tmp_path):
    """Before vLLM starts, which would take it and answer nonsense."""
    adapter, _ = make_adapter(base, tmp_path, 3)
    tensors = load_file(adapter / "adapter_model.safetensors")
    other = {name: t if "lora_B" in name else torch.randn(RANK, 7) for name, t in tensors.items()}
    save_file(other, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelLoadError, match="adapter x: it is for another model"):
        load(base, "vllm", {"x": adapter})


def test_warm_up_refuses_an_adapter_that_gives_no_numbers(base, tmp_path):
    """Before a request is taken; the message has its name."""
    adapter, _ = make_adapter(base, tmp_path, 4)
    tensors = load_file(adapter / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ModelLoadError, match=r"with adapter x fails .* \(NaN\)"):
        load(base, "vllm", {"x": adapter})
