"""Decode steps on fixed buffers: what is written, what is replayed, what stays eager.

The recorder here runs the computation again instead of a CUDA graph, so everything but the
recording itself is what a GPU runs; `tests/gpu` replays real graphs.
"""

import pytest
import torch

from serve_app.config import ModelConfig
from serve_app.engine.cache.allocator import Region
from serve_app.engine.cache.prefix_cache import Holding
from serve_app.engine.model.attention.interface import ShapeProbe
from serve_app.engine.model.attention.sdpa import SdpaBackend
from serve_app.engine.model.attention.varlen import VarlenBackend
from serve_app.engine.model.cuda_graphs import DecodeRows, GraphedForward, sizes
from serve_app.engine.model.kv_cache import KVCache
from serve_app.engine.model.loading import load
from serve_app.engine.model.transformers_forward import TransformersForward
from serve_app.engine.sequence import Move, Row, SamplingPlan, Sequence
from tests.engine.model.test_attention import documented_flash_attention

POOL, ROWS = 512, 13
GREEDY = SamplingPlan(temperature=0, top_p=1, top_k=0, seed=0, stop_token_ids=frozenset())


class Recorder:
    """Counts what is recorded and what is replayed."""

    def __init__(self):
        self.recorded = 0
        self.replayed = []

    def __call__(self, compute):
        self.recorded += 1
        compute()

        def replay():
            self.replayed.append(compute.args[0])
            compute()

        return replay


def build(directory, recorder, attend, *, dtype="float32", num_gpus=0):
    """Return a graphed forward with its cache, and an eager one with a cache of its own."""
    loaded = load(directory, ModelConfig(path="/m", dtype=dtype), num_gpus=num_gpus, num_cpus=1)
    probe, ids = ShapeProbe(), torch.zeros(1, 2, dtype=torch.int64, device=loaded.device)
    with torch.inference_mode():
        loaded.model(input_ids=ids, forward_pass=probe, use_cache=False)
    caches = [KVCache(probe.shapes, POOL + ROWS) for _ in range(2)]
    backend = VarlenBackend(attend)
    graphed = GraphedForward(
        TransformersForward(loaded.model, caches[0], backend, loaded.device),
        DecodeRows(backend, sizes(ROWS), window=64, scratch=POOL, device=loaded.device),
        recorder,
    )
    eager = TransformersForward(loaded.model, caches[1], SdpaBackend(), loaded.device)
    return graphed, eager, caches[0]


@pytest.fixture
def made(model_dir):
    recorder = Recorder()
    graphed, eager, cache = build(model_dir("llama"), recorder, documented_flash_attention)
    return graphed, eager, recorder, cache


def sequence(key, tokens):
    """Return a sequence of that many tokens; each has 32 places of its own."""
    known = [(7 * key + i) % 300 for i in range(tokens)]
    place = Holding(Region(32 * key, 32))
    return Sequence(key, known, tokens, 16, GREEDY, holding=place)


@pytest.mark.parametrize(
    ("max_rows", "expected"),
    [
        (1, (1,)),
        (4, (1, 2, 4)),
        (7, (1, 2, 4, 7)),
        (8, (1, 2, 4, 8)),
        (27, (1, 2, 4, 8, 16, 24, 27)),
    ],
)
def test_sizes_are_close_together_and_hold_every_batch(max_rows, expected):
    """No step is padded by more than seven rows; the largest graph is the largest batch."""
    assert sizes(max_rows) == expected


def assert_same_steps(graphed, eager, **tolerance):
    """Compute prompts and then decode steps of every number of rows with both."""
    sequences = [sequence(key, 3 + key) for key in range(ROWS)]
    prompts = [Row(s, 0, len(s.tokens), 1) for s in sequences]
    torch.testing.assert_close(graphed.logits(prompts), eager.logits(prompts), **tolerance)
    for count in range(1, ROWS + 1):
        for one in sequences[:count]:
            one.tokens.append(count)
        rows = [Row(s, len(s.tokens) - 1, 1, 1) for s in sequences[:count]]
        torch.testing.assert_close(graphed.logits(rows), eager.logits(rows), **tolerance)


@torch.inference_mode()
def test_cuda_graphs_replayed_equal_eager_steps(made):
    """Step by step, for every number of rows, each with its own length; the cache likewise."""
    graphed, eager, recorder, cache = made
    assert recorder.recorded == len(sizes(ROWS))
    assert_same_steps(graphed, eager)
    expected = [min(size for size in sizes(ROWS) if size >= n) for n in range(1, ROWS + 1)]
    assert recorder.replayed == expected
    graphed.move((Move(0, 480, 32),))
    keys = cache._layers[0][0]
    assert torch.equal(keys[480:512], keys[:32])


@torch.inference_mode()
def test_cuda_graphs_keep_padding_out_of_the_pool(made):
    """Rows that nobody asked for touch only their own places, never a sequence's."""
    graphed, _, recorder, cache = made
    for keys, values in cache._layers.values():
        keys[:POOL], values[:POOL] = 7.0, 7.0
    graphed.logits([Row(sequence(key, 9), 8, 1, 1) for key in (2, 5, 6)])
    assert recorder.replayed == [4]
    for keys, values in cache._layers.values():
        for pool in (keys, values):
            touched = (pool[:POOL] != 7.0).flatten(1).any(1).nonzero().flatten().tolist()
            assert touched == [32 * key + 8 for key in (2, 5, 6)]


@pytest.mark.parametrize(
    "row", [{"count": 2, "kept": 1}, {"count": 1, "kept": 0}], ids=["chunk", "no logits"]
)
@torch.inference_mode()
def test_cuda_graphs_leave_eager_what_is_no_decode_row(made, row):
    """A chunk of a prompt in the step, or a row that samples nothing, keeps it off the graphs."""
    graphed, eager, recorder, _ = made
    one, other = sequence(1, 9), sequence(2, 9)
    for forward in (graphed, eager):
        forward.logits([Row(one, 0, 8, 1), Row(other, 0, 7, 1)])
    rows = [Row(one, 8, 1, 1), Row(other, 7, **row)]
    torch.testing.assert_close(graphed.logits(rows), eager.logits(rows))
    assert recorder.replayed == []
