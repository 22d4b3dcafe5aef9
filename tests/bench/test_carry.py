"""The benchmark of what carries tokens."""

import argparse
import itertools

import pytest

from scripts.bench.carry import PacedEngine, Turn, markdown
from serve_app.errors import Overloaded
from serve_app.protocol import GenerationRequest, SamplingParams, TextPrompt


async def test_paced_engine_ticks():
    """One token a tick, each with the time when it was made, as many as were asked for."""
    request = GenerationRequest("r", TextPrompt("a"), SamplingParams(max_tokens=5))
    deltas = [delta async for delta in PacedEngine(0.01, limit=1).generate(request)]
    made = [float(delta.text) for delta in deltas]
    assert len(made) == 5
    assert all(0 < after - before < 1 for before, after in itertools.pairwise(made))
    assert [delta.finish_reason is None for delta in deltas] == [True] * 4 + [False]


def test_markdown_medians():
    """A line for each number of streams, of the middle round."""
    args = argparse.Namespace(interval_ms=20.0, rounds=3, seconds=5.0, label="a proxy")
    turns = [Turn(rate, 3200, rate / 2, [1.0, 2.0, 3.0], [4.0]) for rate in (100.0, 300.0, 200.0)]
    page = markdown({64: turns}, args)
    assert "a proxy" in page
    assert page.splitlines()[-1] == "| 64 | 3200 | 200 | 100 | 2.0 | 4.0 | 4.0 |"


async def test_paced_engine_refuses():
    """What is over the limit is refused until one has ended."""
    engine = PacedEngine(0.01, limit=1)
    request = GenerationRequest("r", TextPrompt("a"), SamplingParams(max_tokens=2))
    first = engine.generate(request)
    await anext(first)
    with pytest.raises(Overloaded):
        await anext(engine.generate(request))
    assert [delta.finish_reason is None async for delta in first] == [False]
    assert len([delta async for delta in engine.generate(request)]) == 2
