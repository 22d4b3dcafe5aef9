"""The region allocator: no overlap, no leak, first fit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.regions import Region, RegionAllocator

ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["allocate", "free", "extend"]), st.integers(1, 40), st.integers(0, 99)
    ),
    max_size=60,
)


@given(ACTIONS)
def test_regions_never_overlap_and_never_leak(actions):
    """Whatever is asked, regions are disjoint, inside the pool, and all of it comes back."""
    pool = RegionAllocator(100)
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
        assert all(0 <= token < 100 for token in taken)
    for region in held:
        pool.free(region)
    assert pool.allocate(100) == Region(0, 100)


def test_the_lowest_hole_that_is_long_enough_is_used():
    """First fit: holes that are too short are passed over."""
    pool = RegionAllocator(30)
    first, _, third = pool.allocate(5), pool.allocate(5), pool.allocate(10)
    pool.free(first)
    pool.free(third)
    assert pool.allocate(6) == Region(10, 6)
    assert pool.allocate(5) == Region(0, 5)
    assert pool.allocate(15) is None
    assert pool.allocate(14) == Region(16, 14)
    assert pool.free_tokens == 0


def test_extending_needs_the_next_token_to_be_free():
    """A region grows in place up to its neighbour and not over it."""
    pool = RegionAllocator(20)
    first = pool.allocate(5)
    second = pool.allocate(5)
    assert pool.extend(first, 6) is None
    assert pool.extend(second, 16) is None
    assert pool.extend(second, 15) == Region(5, 15)


@pytest.mark.parametrize("twice", [Region(0, 5), Region(3, 4), Region(0, 20)])
def test_freeing_what_is_free_is_an_error(twice):
    """Broken bookkeeping is seen at once, not as another request's garbage."""
    pool = RegionAllocator(20)
    pool.free(pool.allocate(5))
    with pytest.raises(ValueError, match="free already"):
        pool.free(twice)
