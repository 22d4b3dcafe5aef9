"""The pools: what is written is read, moves keep contents, budgets are kept."""

import torch

from serve_app.engine.model.attention.step import LayerShape
from serve_app.engine.model.kv_cache import KVCache, tokens_for
from serve_app.engine.sequence import Move

CPU = torch.device("cpu")
SHAPES = {
    0: LayerShape(2, 8, 8, CPU, torch.float32, softcap=False),
    1: LayerShape(1, 8, 4, CPU, torch.float32, softcap=False),
}


def test_kv_cache_writes_land_in_their_slots():
    """Each token's K and V stand where its slot says, in its layer alone."""
    cache = KVCache(SHAPES, 20)
    key, value = torch.randn(3, 1, 8), torch.randn(3, 1, 4)
    keys, values = cache.write(1, torch.tensor([4, 19, 0]), key, value)
    assert keys.shape == (20, 1, 8)
    assert values.shape == (20, 1, 4)
    assert torch.equal(keys[[4, 19, 0]], key)
    assert torch.equal(values[[4, 19, 0]], value)
    assert keys.count_nonzero() == 24
    none = torch.empty(0, 2, 8)
    untouched = cache.write(0, torch.empty(0, dtype=torch.int64), none, none)
    assert not any(pool.any() for pool in untouched)


def test_kv_cache_moves_copy_every_layer_in_order():
    """A second move may use the place that the first one left."""
    cache = KVCache(SHAPES, 20)
    slots = torch.arange(20)
    key = torch.arange(20.0).view(20, 1, 1).expand(20, 2, 8)
    keys, values = cache.write(0, slots, key, key)
    cache.move((Move(0, 10, 5), Move(15, 0, 5)))
    assert keys[:, 0, 0].tolist() == [15, 16, 17, 18, 19, *range(5, 10), *range(5), *range(15, 20)]
    assert torch.equal(keys, values)


def test_kv_cache_is_as_large_as_the_smallest_device_allows():
    """Layers share their device's budget; every layer needs every token."""
    other = torch.device("meta")
    shapes = {**SHAPES, 2: LayerShape(2, 8, 8, other, torch.float32, softcap=False)}
    assert tokens_for(shapes, {CPU: 176 * 10 + 5, other: 10**9}) == 10
    assert tokens_for(shapes, {CPU: 10**9, other: 128 * 3}) == 3
    assert tokens_for(shapes, {CPU: -5, other: 10**9}) == 0
    assert KVCache(SHAPES, 10).bytes == 1760
