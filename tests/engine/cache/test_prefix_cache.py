"""What is cached: found by all tokens before it, kept once, evicted oldest first."""

from serve_app.engine.cache.allocator import BLOCK_TOKENS, Region
from serve_app.engine.cache.prefix_cache import PrefixCache, extend_chain


def chain(*blocks: int) -> list[bytes]:
    digests: list[bytes] = []
    tokens = [block for block in blocks for _ in range(BLOCK_TOKENS)]
    extend_chain(digests, tokens, len(blocks))
    return digests


def cached(cache: PrefixCache, *blocks: int, spare: int = 0):
    holding = cache.place((len(blocks) + spare) * BLOCK_TOKENS)
    cache.add(holding, chain(*blocks))
    cache.release(holding)
    return holding


def test_extend_chain_tells_a_block_from_its_equal_after_other_tokens():
    """The digest is of the whole beginning, and of no token after the last whole block."""
    assert chain(1, 2)[1] != chain(3, 2)[1]
    assert chain(1, 2)[:1] == chain(1)
    digests: list[bytes] = []
    extend_chain(digests, [1] * BLOCK_TOKENS + [2], 1)
    assert digests == chain(1)


def test_prefix_cache_keeps_a_released_holdings_blocks_and_frees_the_rest():
    """Only whole computed blocks stay; they count as cached and not as used."""
    cache = PrefixCache(320)
    holding = cached(cache, 1, 2, spare=3)
    assert holding.region == Region(0, 64)
    assert (cache.cached_tokens, cache.used_tokens) == (64, 0)
    assert cache.find(chain(1, 2, 3)) == (64, holding)
    assert cache.find(chain(1, 9)) == (32, holding)
    assert cache.find(chain(2)) == (0, None)


def test_prefix_cache_keeps_no_beginning_beside_its_continuation():
    """The shorter goes when the longer comes, and does not come when the longer is there."""
    cache = PrefixCache(320)
    cached(cache, 1, 2)
    long = cached(cache, 1, 2, 3)
    cached(cache, 1)
    assert cache.cached_tokens == 96
    assert cache.find(chain(1)) == (32, long)


def test_prefix_cache_evicts_the_least_recently_found_first():
    """A hit makes a holding young again."""
    cache = PrefixCache(3 * 64)
    holdings = [cached(cache, kind, kind) for kind in range(3)]
    cache.find(chain(0))
    assert cache.place(64).region == holdings[1].region
    assert cache.place(64).region == holdings[2].region
    assert cache.find(chain(0, 0)) == (64, holdings[0])


def test_prefix_cache_evicts_only_what_makes_the_hole():
    """Cached neighbours and holes join; what would not help stays, and so does the spare one."""
    cache = PrefixCache(6 * 32)
    first, second, third = cached(cache, 1), cached(cache, 2), cached(cache, 3)
    busy = cache.place(64)
    assert cache.place(128) is None
    assert cache.cached_tokens == 96, "it went for nothing"
    assert cache.place(64, spare=second) is None
    assert cache.place(64, spare=first).region == Region(32, 64)
    assert cache.find(chain(1)) == (32, first)
    assert cache.find(chain(3)) == (0, None)
    assert third.region.end == busy.region.start


def test_prefix_cache_finds_what_is_running_and_does_not_take_it_over():
    """Only a cached holding changes hands, and only if it can grow where it is."""
    cache = PrefixCache(320)
    running = cache.place(64)
    cache.add(running, chain(1))
    assert cache.find(chain(1)) == (32, running)
    assert not cache.take_over(running, 64)
    cache.release(running)
    assert cache.take_over(running, 96)
    assert running.region == Region(0, 96)
    assert (cache.cached_tokens, cache.used_tokens) == (0, 96)
    cache.release(running)
    cache.place(64)
    assert not cache.take_over(running, 96)
    assert cache.cached_tokens == 32


def test_prefix_cache_that_is_off_remembers_nothing():
    """Regions are freed whole."""
    cache = PrefixCache(320, enabled=False)
    cached(cache, 1, 2)
    assert cache.find(chain(1)) == (0, None)
    assert cache.cached_tokens == cache.used_tokens == 0
