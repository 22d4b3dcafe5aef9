"""A Llama in fewer operations against transformers' own; `tests/gpu` compiles it."""

import pytest
import torch
from structlog.testing import capture_logs

from serve_app.config import ModelConfig
from serve_app.engine.model.attention.interface import ShapeProbe
from serve_app.engine.model.attention.sdpa import SdpaBackend
from serve_app.engine.model.fused_llama import FusedLlama
from serve_app.engine.model.kv_cache import KVCache
from serve_app.engine.model.llama_like import difference
from serve_app.engine.model.loading import load
from serve_app.engine.model.transformers_forward import TransformersForward
from serve_app.engine.sequence import Row
from tests.engine.model.test_cuda_graphs import sequence
from tests.models import make_model

LLAMAS = ("llama", "llama-rope-scaled", "llama-mha-tied", "qwen2", "qwen3", "mistral-window")
POOL = 256


def loaded_model(directory):
    return load(directory, ModelConfig(path="/m", dtype="float32"), num_gpus=0, num_cpus=1).model


def logits(model, batches):
    """Compute batches of rows, one after the other, with a cache of the model's own."""
    look = ShapeProbe()
    device = next(iter(model.parameters())).device
    with torch.inference_mode():
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        model(
            input_ids=ids,
            position_ids=torch.arange(2, device=device)[None],
            logits_to_keep=torch.tensor([1], device=device),
            use_cache=False,
            forward_pass=look,
        )
        forward = TransformersForward(model, KVCache(look.shapes, POOL), SdpaBackend(), device)
        return [forward.logits(rows).clone() for rows in batches]


def batches():
    """Return prompts, then a decode step beside a chunk, then one row alone."""
    first, second, third = sequence(0, 20), sequence(1, 7), sequence(2, 15)
    return [
        [Row(first, 0, 19, 1), Row(second, 0, 6, 2)],
        [Row(first, 19, 1, 1), Row(second, 6, 1, 1), Row(third, 0, 14, 0)],
        [Row(third, 14, 1, 1)],
    ]


@pytest.mark.parametrize("name", LLAMAS)
def test_fused_llama_computes_what_transformers_does(name, model_dir):
    """Packed rows of all kinds, over the same cache."""
    model = loaded_model(model_dir(name))
    assert difference(model) is None
    expected = logits(model, batches())
    for got, want in zip(logits(FusedLlama(model), batches()), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_fused_llama_knows_no_window_of_a_llama(tmp_path):
    """Its attention reads none; a config that was a Mistral's may say so all the same."""
    model = loaded_model(make_model(tmp_path / "m", "llama", sliding_window=5))
    expected = logits(model, batches())
    for got, want in zip(logits(FusedLlama(model), batches()), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_fused_llama_holds_its_weights_once(model_dir):
    """The model's own projections are views of the joined ones, so no memory is taken twice."""
    model = loaded_model(model_dir("qwen2"))
    names = [name for name, _ in model.named_parameters()]
    before = logits(model, batches())
    fused = FusedLlama(model)
    assert [name for name, _ in model.named_parameters()] == names
    attention = model.model.layers[1].self_attn
    joined = fused._layers[1].before["qkv"]
    assert attention.k_proj.weight.data_ptr() > attention.q_proj.weight.data_ptr()
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert part.weight.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    for got, want in zip(logits(model, batches()), before, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # it computes as it did


def test_fused_llama_compiles_for_one_row_and_for_any_number(model_dir):
    """While loading: no request waits for a compiler."""
    compiled = []

    def compile_(function):
        def called(*args, **kwargs):
            compiled.append((function.__name__, len(args[0])))
            return function(*args, **kwargs)

        return called

    FusedLlama(loaded_model(model_dir("llama")), compile_)
    both = ("before_attention", "after_attention")
    assert compiled == [(name, rows) for rows in (2, 1) for name in both]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fused_llama_is_traced_while_loading_alone(name, model_dir):
    """By torch's own tracer: two graphs of either function do for all layers and any rows."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    model = loaded_model(model_dir(name))
    expected = logits(model, batches())
    fused = FusedLlama(model, lambda function: torch.compile(function, backend=backend))
    assert len(graphs) == 4
    got = logits(fused, batches())
    torch._dynamo.reset()
    assert len(graphs) == 4
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_fused_llama_runs_uncompiled_where_torch_cannot_compile(model_dir):
    """No C compiler in the image, say: slower, and the log says so."""

    def compile_(_function):
        def fails(*_args, **_kwargs):
            raise RuntimeError("Failed to find C compiler.\nand a long story")

        return fails

    model = loaded_model(model_dir("llama"))
    expected = logits(model, batches())
    with capture_logs() as logs:
        fused = FusedLlama(model, compile_)
    warned = [(log["event"], log["reason"]) for log in logs]
    assert warned == [("engine.compile_unavailable", "Failed to find C compiler.")]
    for got, want in zip(logits(fused, batches()), expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["gemma3-mixed-window", "phi3", "mixtral"])
def test_difference_names_what_is_no_llama(name, model_dir):
    """Those compute through transformers' own forward."""
    assert "not Llama-like enough" in difference(loaded_model(model_dir(name)))
