"""Deterministic steps of models that have no compiled forward."""

import pytest
import torch

from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.model.batch_invariant import FixedForward
from serve_app.engine.model.build import assemble
from serve_app.engine.model.loading import load
from serve_app.engine.sequence import Row
from tests.engine.invariance import PLACES, assert_invariant, sequence
from tests.models import VOCAB

ROWS = 13


def build(directory, *, dtype="float32", deterministic=True):
    loaded = load(directory, ModelConfig(path="/m", dtype=dtype), num_gpus=0, num_cpus=2)
    config = EngineConfig(
        native_cpu=False, deterministic=deterministic, max_running_requests=ROWS, kv_cache_cpu_gib=1
    )
    return assemble(loaded, config).forward


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2-softcap-window"])
@torch.inference_mode()
def test_batch_invariant_result_is_bitwise_the_same_in_any_company_and_any_chunks(
    model_dir, name, dtype
):
    """Alone, then in random batches, chunks and places."""
    assert_invariant(build(model_dir(name), dtype=dtype), VOCAB, ROWS)


@torch.inference_mode()
def test_batch_invariant_fails_without_it(model_dir):
    """The test above could fail: the same model in batches of any size does."""
    forward = build(model_dir("llama"), dtype="float32", deterministic=False)
    with pytest.raises(AssertionError):
        assert_invariant(forward, VOCAB, ROWS)


@torch.inference_mode()
def test_batch_invariant_logits_are_those_of_an_eager_step(model_dir):
    """Chunks, rows without logits, whole prompts and guesses, over several batches."""
    fixed = build(model_dir("llama"))
    assert isinstance(fixed, FixedForward)
    eager = build(model_dir("llama"), deterministic=False)
    some = [sequence([7 * key + i for i in range(9 + key)], key * PLACES) for key in range(4)]
    for rows in (
        [Row(some[0], 0, 9, 9), Row(some[1], 0, 5, 0), Row(some[2], 0, 11, 1)],
        [Row(some[1], 5, 5, 2), Row(some[2], 10, 3, 3, (5, 6)), Row(some[3], 0, 12, 1)],
    ):
        torch.testing.assert_close(fixed.logits(rows), eager.logits(rows))
