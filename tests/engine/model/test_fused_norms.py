"""Norms by torch's kernel: the same numbers, and none where another function is meant."""

import pytest
import torch

from serve_app.config import ModelConfig
from serve_app.engine.model.attention.interface import ShapeProbe
from serve_app.engine.model.fused_norms import fuse_norms
from serve_app.engine.model.loading import load
from tests.models import ARCHITECTURES

DIM = 48
# A model's norms: two a layer and the last one; Qwen 3 has two more a layer.
EXPECTED = dict.fromkeys(ARCHITECTURES, 7) | {
    "qwen3": 13,
    "gemma2-softcap-window": 0,
    "gemma3-mixed-window": 0,
}


@torch.inference_mode()
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fuse_norms_computes_the_same(name, model_dir):
    """In float32 within its rounding, in bf16 within that; a Gemma's norm is another function."""
    for dtype, tolerance in (("float32", 1e-5), ("bfloat16", 0.1)):
        config = ModelConfig(path="/m", dtype=dtype)
        model = load(model_dir(name), config, num_gpus=0, num_cpus=1).model
        ids = torch.arange(40)[None]

        def logits(model=model, ids=ids):
            return model(input_ids=ids, forward_pass=ShapeProbe(), use_cache=False).logits

        before = logits()
        weights = {key: value.data_ptr() for key, value in model.named_parameters()}
        assert fuse_norms(model) == EXPECTED[name]
        assert {key: value.data_ptr() for key, value in model.named_parameters()} == weights
        torch.testing.assert_close(logits(), before, rtol=tolerance, atol=tolerance)
        assert fuse_norms(model) == 0


class LlamaRMSNorm(torch.nn.Module):
    def __init__(self, epsilon=1e-6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(DIM))
        self.variance_epsilon = epsilon

    def forward(self, hidden_states):
        return self.scale() * self.normed(hidden_states)

    def scale(self):
        return self.weight

    def normed(self, hidden, axis=-1):
        mean = hidden.pow(2).mean(axis, keepdim=True)
        return hidden * torch.rsqrt(mean + self.variance_epsilon)


class GemmaRMSNorm(LlamaRMSNorm):
    def scale(self):
        return 1 + self.weight


class CenteredRMSNorm(LlamaRMSNorm):
    def normed(self, hidden, axis=-1):
        return super().normed(hidden - hidden.mean(axis, keepdim=True))


class WholeRMSNorm(LlamaRMSNorm):
    def normed(self, hidden, axis=(-2, -1)):
        return super().normed(hidden, axis)


class OtherEpsilonRMSNorm(LlamaRMSNorm):
    def normed(self, hidden, axis=-1):
        return hidden / (hidden.pow(2).mean(axis, keepdim=True).sqrt() + self.variance_epsilon)


class GatedRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate)


class BiasedRMSNorm(LlamaRMSNorm):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(DIM))


class FailingRMSNorm(LlamaRMSNorm):
    def normed(self, hidden, axis=-1):
        raise RuntimeError("flat tokens only")


class LayerNorm(LlamaRMSNorm):
    """Another name promises nothing."""


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_fuse_norms_replaces_a_norm_like_llamas(epsilon):
    """It keeps its weight and its epsilon."""
    model = torch.nn.Sequential(LlamaRMSNorm(epsilon))
    weight = model[0].weight
    assert fuse_norms(model) == 1
    assert isinstance(model[0], torch.nn.RMSNorm)
    assert model[0].weight is weight
    assert model[0].eps == epsilon


@pytest.mark.parametrize(
    "kind",
    [
        GemmaRMSNorm,
        CenteredRMSNorm,
        WholeRMSNorm,
        OtherEpsilonRMSNorm,
        GatedRMSNorm,
        BiasedRMSNorm,
        FailingRMSNorm,
        LayerNorm,
    ],
)
def test_fuse_norms_leaves_what_is_not_surely_the_same(kind):
    """Whatever its weights are now: ones, or zeros as a Gemma's."""
    for fill in (0.0, 1.0):
        model = torch.nn.Sequential(kind())
        torch.nn.init.constant_(model[0].weight, fill)
        assert fuse_norms(model) == 0
        assert type(model[0]) is kind
