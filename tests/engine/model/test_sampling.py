"""Sampling: right distributions, own noise, faults that stay in their row."""

import math

import pytest
import torch

from serve_app.engine.model import sampling
from serve_app.engine.model.sampling import finite, uniform
from serve_app.engine.sequence import SamplingPlan

DRAWS = 4000


def sample(logits, plans, indices):
    return sampling.sample(logits, plans, indices).tolist()


def plan(temperature=1.0, top_p=1.0, top_k=0, seed=1):
    return SamplingPlan(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)


def reference(logits, chosen):
    """Probabilities as transformers' warpers define them: temperature, top_k, then top_p."""
    scores = logits.double() / chosen.temperature
    if chosen.top_k:
        scores[scores < scores.topk(chosen.top_k).values[-1]] = -math.inf
    ordered, order = scores.sort(descending=True)
    mass = ordered.softmax(-1)
    scores[order[mass.cumsum(-1) - mass >= chosen.top_p]] = -math.inf
    return scores.softmax(-1)


@pytest.mark.parametrize(
    "chosen",
    [
        plan(),
        plan(temperature=0.5),
        plan(temperature=1.7, top_k=7),
        plan(top_p=0.6),
        plan(temperature=1.3, top_k=9, top_p=0.8),
        plan(top_p=1e-6),
    ],
    ids=str,
)
def test_sample_follows_the_reference_distribution(chosen):
    """χ² of 4,000 draws against transformers' order of temperature, top_k and top_p."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(2)) * 2
    expected = reference(logits, chosen) * DRAWS
    tokens = sample(logits.expand(DRAWS, -1), [chosen] * DRAWS, range(DRAWS))
    counts = torch.bincount(torch.tensor(tokens), minlength=40)
    assert counts[expected == 0].sum() == 0
    common = expected > 5
    chi2 = ((counts[common] - expected[common]) ** 2 / expected[common]).sum()
    freedom = int(common.sum()) - 1
    assert chi2 <= freedom + 5 * math.sqrt(2 * freedom)


def test_sample_from_a_wide_nucleus_is_exact(monkeypatch):
    """A nucleus wider than what is sorted at first gives the same tokens as sorting all."""
    logits = torch.randn(64, 3000, generator=torch.Generator().manual_seed(4)) * 0.1
    plans = [plan(top_p=0.95, top_k=k % 3 * 1200, seed=k) for k in range(64)]
    quick = sample(logits, plans, [0] * 64)
    monkeypatch.setattr(sampling, "NUCLEUS", 3000)
    assert sample(logits, plans, [0] * 64) == quick


def test_sample_sorts_everything_only_for_rows_of_a_wide_nucleus(monkeypatch):
    """One of them costs its neighbours nothing."""
    sorted_shapes = []
    floor = sampling._floor

    def spy(scaled, width, *rest):
        sorted_shapes.append((len(scaled), width))
        return floor(scaled, width, *rest)

    monkeypatch.setattr(sampling, "_floor", spy)
    logits = torch.randn(5, 3000, generator=torch.Generator().manual_seed(4)) * 20
    logits[2] /= 200
    together = sample(logits, [plan(top_p=0.95, seed=k) for k in range(5)], [0] * 5)
    assert sorted_shapes == [(5, sampling.NUCLEUS), (1, 3000)]
    alone = [sample(logits[k : k + 1], [plan(top_p=0.95, seed=k)], [0])[0] for k in range(5)]
    assert together == alone


def test_sample_greedily_takes_the_first_largest():
    """Temperature 0 takes the maximum, the lowest id among equals."""
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    assert sample(logits, [plan(temperature=0)] * 2, [0, 0]) == [1, 0]


@pytest.mark.parametrize("temperature", [1e-30, 1e-6, 1e-3])
def test_sample_at_a_tiny_temperature_is_greedy(temperature):
    """No overflow, no NaN: the maximum wins."""
    logits = torch.tensor([[-400.0, 900.0, 899.0]])
    assert sample(logits, [plan(temperature=temperature)], [0]) == [1]


def test_sample_depends_on_a_rows_seed_and_index_alone():
    """Neighbours, their rules and the order of rows change nothing."""
    logits = torch.randn(12, 500, generator=torch.Generator().manual_seed(5))
    rules = ((1.0, 0.9, 0), (0.7, 1.0, 20), (0, 1.0, 0), (1.5, 0.5, 5))
    plans = [plan(*rules[i % 4], seed=i) for i in range(12)]
    together = sample(logits, plans, range(12))
    alone = [sample(logits[i : i + 1], [plans[i]], [i])[0] for i in range(12)]
    assert together == alone
    backwards = sample(logits.flip(0), plans[::-1], list(range(12))[::-1])
    assert backwards[::-1] == together


def test_uniform_noise_is_new_for_every_token():
    """A thousand seeds and indices: mean, spread and no repeats of a row by its neighbour."""
    values = torch.tensor([[uniform(seed, index) for index in range(50)] for seed in range(50)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.02
    assert abs(values.var() - 1 / 12) < 0.005
    assert len(values.unique()) > 2490
    assert abs(torch.corrcoef(values)[0, 1:]).max() < 0.7


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_sample_fails_a_row_that_is_not_finite_alone(poison, temperature):
    """NaN or an infinity in one row leaves the others' tokens as they are."""
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(6))
    plans = [plan(temperature=temperature, top_p=0.9, seed=i) for i in range(3)]
    clean = sample(logits, plans, [0] * 3)
    logits[1, 7] = poison
    assert finite(logits).tolist() == [True, False, True]
    assert sample(logits, plans, [0] * 3)[::2] == clean[::2]


def test_sample_computes_bfloat16_logits_in_float32():
    """A token that is 2^-9 less likely in sum is not lost to bf16's eight bits."""
    logits = torch.zeros(DRAWS, 512, dtype=torch.bfloat16)
    tokens = sample(logits, [plan(seed=i) for i in range(DRAWS)], [0] * DRAWS)
    counts = torch.bincount(torch.tensor(tokens), minlength=512).double()
    assert (counts > 0).all()
    assert ((counts - DRAWS / 512) ** 2 / (DRAWS / 512)).sum() < 511 + 5 * math.sqrt(2 * 511)
