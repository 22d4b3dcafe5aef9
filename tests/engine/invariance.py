"""The same sequences alone and in company, for every forward that claims to be deterministic."""

import random

import torch

from serve_app.engine.cache.allocator import Region
from serve_app.engine.cache.prefix_cache import Holding
from serve_app.engine.sequence import Row, SamplingPlan, Sequence

PLACES = 256  # of each sequence in the cache
PLAIN = SamplingPlan(temperature=0, top_p=1, top_k=0, seed=0, stop_token_ids=frozenset())


def sequence(tokens: list[int], place: int) -> Sequence:
    return Sequence(
        key=place,
        tokens=list(tokens),
        prompt_tokens=len(tokens),
        max_tokens=100,
        sampling=PLAIN,
        holding=Holding(Region(place, PLACES)),
    )


def assert_invariant(forward, vocabulary: int, count: int) -> None:
    """Compute sequences alone, then in random batches, chunks and places: the same bits.

    Args:
        forward: with `count * PLACES` tokens of cache.
        vocabulary: size of it.
        count: sequences.
    """
    rng = random.Random(7)
    some = [
        sequence([rng.randrange(vocabulary) for _ in range(rng.randint(1, 120))], PLACES * index)
        for index in range(count)
    ]
    alone = [forward.logits([Row(s, 0, len(s.tokens), 1)])[0].clone() for s in some]
    places = list(range(0, count * PLACES, PLACES))
    rng.shuffle(places)
    for each, place in zip(some, places, strict=True):
        each.holding = Holding(Region(place, PLACES))
    together: dict[int, torch.Tensor] = {}
    while len(together) < count:
        missing = [s for s in some if s.computed < len(s.tokens)]
        rows = []
        for each in sorted(rng.sample(missing, min(len(missing), rng.randint(1, 9))), key=_place):
            left = len(each.tokens) - each.computed
            chunk = rng.randint(1, min(left, 40))
            rows.append(Row(each, each.computed, chunk, int(chunk == left)))
        logits = iter(forward.logits(rows))
        for row in rows:
            row.sequence.computed += row.count
            if row.kept:
                together[row.sequence.key] = next(logits)
    for each, want in zip(some, alone, strict=True):
        assert torch.equal(together[each.key], want)


def _place(some: Sequence) -> int:
    return some.region.start
