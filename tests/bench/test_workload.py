"""The benchmark's requests."""

import random

from scripts.bench.workload import ALONE, LENGTHS, make

TEXT = [random.Random(0).randrange(49_000) for _ in range(2_500)]


def test_lengths_are_the_published_ones():
    """32 requests, 4,728 and 2,180 tokens: results stay comparable over time."""
    prompts, completions = zip(*LENGTHS, strict=True)
    assert (len(LENGTHS), sum(prompts), sum(completions)) == (32, 4728, 2180)
    assert (min(prompts), max(prompts)) == (21, 256)
    assert (min(completions), max(completions)) == (16, 128)


def test_make_requests_of_those_lengths_which_repeat():
    """The same turn gives the same requests; one stream is the first few of them."""
    requests = make(TEXT, streams=32, turn=3)
    assert [(len(r.prompt), r.max_tokens) for r in requests] == list(LENGTHS)
    assert make(TEXT, streams=32, turn=3) == requests
    assert make(TEXT, streams=1, turn=3) == requests[:ALONE]
    assert len(make(TEXT, streams=64, turn=3)) == 64


def test_make_no_two_prompts_that_begin_alike():
    """A cache of prefixes finds nothing, so every run does the whole work."""
    every = [r.prompt[0] for turn in range(1, 9) for r in make(TEXT, streams=64, turn=turn)]
    assert len(set(every)) == len(every)
