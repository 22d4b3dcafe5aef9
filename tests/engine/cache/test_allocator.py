"""The region allocator: no overlap, no leak, first fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.cache.allocator import BLOCK_TOKENS, Region, RegionAllocator

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "free", "extend"]), st.integers(1, 400), st.integers(0, 99)
    ),
    max_size=60,
)


def blocks(start: int, length: int) -> Region:
    return Region(start * BLOCK_TOKENS, length * BLOCK_TOKENS)


def pool_of(length: int) -> RegionAllocator:
    return RegionAllocator(length * BLOCK_TOKENS)


@given(ACTIONS)
def test_allocator_regions_never_overlap_and_never_leak(actions):
    """Whatever is asked, regions are whole blocks, disjoint, in the pool, and all come back."""
    pool = RegionAllocator(1000)
    held: list[Region] = []
    for action, length, pick in actions:
        if action == "allocate" and (region := pool.allocate(length)):
            held.append(region)
        elif action != "allocate" and held:
            region = held.pop(pick % len(held))
            if action == "free":
                pool.free(region)
            else:
                held.append(pool.extend(region, region.length + length) or region)
        taken = [token for region in held for token in range(region.start, region.end)]
        assert len(taken) == len(set(taken)) == pool.used_tokens
        assert all(0 <= token < 1000 for token in taken)
        assert all(r.start % BLOCK_TOKENS == r.length % BLOCK_TOKENS == 0 for r in held)
        assert sum(hole.length for hole in pool.holes) == pool.free_tokens
    for region in held:
        pool.free(region)
    assert pool.allocate(980) == blocks(0, 31)


def test_allocator_uses_the_lowest_hole_that_is_long_enough():
    """First fit: holes that are too short are passed over; lengths are rounded up."""
    pool = pool_of(6)
    first, _, third = pool.allocate(30), pool.allocate(1), pool.allocate(64)
    pool.free(first)
    pool.free(third)
    assert pool.allocate(33) == blocks(2, 2)
    assert pool.allocate(32) == blocks(0, 1)
    assert pool.allocate(65) is None
    assert pool.allocate(64) == blocks(4, 2)
    assert pool.free_tokens == 0


def test_allocator_extends_only_where_the_next_token_is_free():
    """A region grows in place up to its neighbour and not over it."""
    pool = pool_of(4)
    first = pool.allocate(32)
    second = pool.allocate(32)
    assert pool.extend(first, 33) is None
    assert pool.extend(second, 97) is None
    assert pool.extend(second, 70) == blocks(1, 3)


@pytest.mark.parametrize("twice", [blocks(0, 2), blocks(1, 2), blocks(0, 4)])
def test_allocator_raises_when_what_is_free_is_freed(twice):
    """Broken bookkeeping is seen at once, not as another request's garbage."""
    pool = pool_of(4)
    pool.free(pool.allocate(64))
    with pytest.raises(ValueError, match="free already"):
        pool.free(twice)
