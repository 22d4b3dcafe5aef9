"""Penalties, bias, bans and min_p against what their definitions say, and logprobs."""

import asyncio
import math

import numpy as np
import pytest
import torch

from serve_app.engine.model.logits_processors import adjusted
from serve_app.engine.model.sampling import sample, score
from serve_app.engine.sequence import SamplingPlan, Sequence
from serve_app.errors import InvalidRequest
from serve_app.protocol import GenerationRequest, SamplingParams, TokenPrompt
from tests.engine.conftest import collect, run

VOCABULARY = 40
PROMPT = [3, 4, 4, 5]
COMPLETION = [7, 8, 8, 8, 4]


def plan(**settings) -> SamplingPlan:
    settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1, **settings}
    return SamplingPlan(**{"stop_token_ids": frozenset({0, 2}), **settings})


def sequence(tokens=(*PROMPT, *COMPLETION), **settings) -> Sequence:
    return Sequence(0, list(tokens), len(PROMPT), 100, plan(**settings))


def logits(rows=1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def reference(row: np.ndarray, tokens: list[int], **settings) -> np.ndarray:
    """The definitions, one token at a time, in plain Python."""
    out = row.astype(np.float64).copy()
    for token, bias in settings.get("logit_bias", ()):
        out[token] += bias
    for token in range(len(out)):
        uses = tokens[len(PROMPT) :].count(token)
        factor = settings.get("repetition_penalty", 1.0)
        if token in tokens:
            out[token] = out[token] / factor if out[token] > 0 else out[token] * factor
        out[token] -= settings.get("frequency_penalty", 0.0) * uses
        out[token] -= settings.get("presence_penalty", 0.0) * (uses > 0)
    return out


CASES = [
    {"frequency_penalty": 0.7},
    {"presence_penalty": -0.4},
    {"repetition_penalty": 1.3},
    {"logit_bias": ((8, 5.0), (9, -100.0))},
    {
        "frequency_penalty": 0.5,
        "presence_penalty": 0.25,
        "repetition_penalty": 0.8,
        "logit_bias": ((4, 1.5),),
    },
]


@pytest.mark.parametrize("settings", CASES, ids="+".join)
def test_adjust_follows_the_definitions(settings):
    """OpenAI's and vLLM's formulas; prompt tokens count for the repetition penalty alone."""
    some = sequence(**settings)
    row = logits()
    got = adjusted(row, [some])[0].double().numpy()
    want = reference(row[0].numpy(), some.tokens, **settings)
    assert np.allclose(got, want, atol=1e-5)


def test_adjust_counts_on_and_starts_over():
    """Step by step, or all at once after the state was lost: the same logits."""
    settings = CASES[-1]
    row = logits()
    grown = sequence(PROMPT, **settings)
    for token in COMPLETION:
        adjusted(row, [grown])
        grown.tokens.append(token)
    assert torch.equal(adjusted(row, [grown]), adjusted(row, [sequence(**settings)]))


def test_adjust_changes_only_rows_that_ask():
    """Neighbours stay as they are, the given logits too."""
    rows = logits(3)
    before = rows.clone()
    got = adjusted(rows, [sequence(), sequence(presence_penalty=1.0), sequence()])
    assert torch.equal(rows, before)
    assert torch.equal(got[::2], rows[::2])
    assert not torch.equal(got[1], rows[1])
    assert adjusted(rows, [sequence()] * 3) is rows


def test_adjust_of_a_batch_is_that_of_its_rows():
    """Together and alone the same bits, whatever each of them asks for and has used."""
    settings = [{}, *CASES, {"min_tokens": 90}, {"min_tokens": 90, **CASES[-1]}]
    some = [
        sequence((*PROMPT, *COMPLETION[: count % 6]), **each)
        for count, each in enumerate(settings * 2)
    ]
    rows = logits(len(some))
    together = adjusted(rows, some)
    for row, each in enumerate(some):
        alone = Sequence(1, each.tokens, each.prompt_tokens, 100, each.sampling)
        assert torch.equal(adjusted(rows[row : row + 1], [alone])[0], together[row])


class Walk:
    """A structure that allows some tokens."""

    def __init__(self, allowed, size=VOCABULARY):
        bits = np.zeros(size, np.uint8)
        bits[list(allowed)] = 1
        self.mask = np.packbits(bits, bitorder="little")


@pytest.mark.parametrize("columns", [VOCABULARY - 3, VOCABULARY, VOCABULARY + 5])
def test_masks_leave_what_they_allow(columns):
    """Each row its own, beside free ones; a mask may be shorter or longer than the logits."""
    allowed = [{1, 8, 39}, {0, 2, 7, 36}, {0, 2}]
    some = [sequence(), *(sequence(min_tokens=i * 90) for i in range(3))]
    for each, tokens in zip(some[1:], allowed, strict=True):
        each.matcher = Walk(tokens)
    rows = torch.zeros(4, columns)
    left = [row.isfinite().nonzero().flatten().tolist() for row in adjusted(rows, some)]
    # Ends, 0 and 2, may not come before `min_tokens`, unless nothing else may.
    assert left[0] == list(range(columns))
    assert left[1:] == [[i for i in (1, 8, 39) if i < columns], [7, 36], [0, 2]]
    assert torch.equal(adjusted(rows[1:], some[1:]), adjusted(rows, some)[1:])


def test_min_tokens_ban_the_ends_until_then():
    """Neither an end-of-sequence id nor a stop id before."""
    row = logits()
    early = adjusted(row, [sequence(min_tokens=6)])[0]
    assert early[[0, 2]].tolist() == [-math.inf, -math.inf]
    assert torch.equal(adjusted(row, [sequence(min_tokens=5)])[0], row[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"min_p": 0.1},
        {"min_p": 0.3, "temperature": 0.7},
        {"top_p": 0.8, "min_p": 0.05},
        {"top_k": 5, "temperature": 1.4},
        {"top_k": 9, "top_p": 0.6},
    ],
    ids=str,
)
def test_sample_draws_by_the_adjusted_distribution(settings):
    """Chi-squared over 20,000 draws against probabilities made by their definitions."""
    row = logits()[0] / 2
    draws = 20_000
    probabilities = torch.softmax(row.double() / settings.get("temperature", 1.0), 0).numpy()
    keep = probabilities >= settings.get("min_p", 0.0) * probabilities.max()
    order = np.argsort(-np.where(keep, probabilities, 0))
    if settings.get("top_k"):
        keep[order[settings["top_k"] :]] = False
    if "top_p" in settings:
        left = np.where(keep, probabilities, 0)
        left = left / left.sum()
        before = np.cumsum(left[order]) - left[order]
        keep[order[before >= settings["top_p"]]] = False
    want = np.where(keep, probabilities, 0)
    want = want / want.sum()
    plans = [plan(**{**settings, "seed": seed}) for seed in range(draws)]
    got = np.bincount(sample(row.expand(draws, -1), plans, [0] * draws), minlength=VOCABULARY)
    assert (got[~keep] == 0).all()
    expected = want[keep] * draws
    statistic = float((((got[keep] - expected) ** 2) / expected).sum())
    freedom = int(keep.sum()) - 1
    # Wilson and Hilferty's approximation of the quantile at 1 - 1e-4.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_score_is_the_models_own():
    """Log-softmax of the raw logits, alternatives in order."""
    rows = logits(2)
    want = rows.double().log_softmax(-1)
    first, second = score(rows, [5, 6], [3, 0])
    assert first.logprob == pytest.approx(want[0, 5].item(), abs=1e-5)
    assert [token for token, _ in first.top] == want[0].topk(3).indices.tolist()
    assert (second.token, second.top) == (6, ())


async def test_logprobs_of_completion_and_prompt_equal_a_forward(load, model_dir):
    """Whatever the chunks: one for each token, the first of the prompt has none."""
    engine = load(max_batch_tokens=32)
    prompt = [5 + i % 90 for i in range(150)]
    sampling = SamplingParams(temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    deltas = await collect(engine, GenerationRequest("r", TokenPrompt(tuple(prompt)), sampling))
    tokens = [token for delta in deltas for token in delta.token_ids]
    sampled = [part for delta in deltas for part in delta.logprobs]
    first = deltas[0].prompt_logprobs
    assert [delta.prompt_logprobs for delta in deltas[1:]] == [()] * (len(deltas) - 1)
    assert len(first) == 150
    assert first[0].chosen is None
    from tests.engine.conftest import Reference

    with torch.inference_mode():
        ids = torch.tensor([prompt + tokens])
        want = Reference(model_dir("llama")).model(ids).logits[0].log_softmax(-1)
    for place, part in enumerate(first[1:], 1):
        assert part.chosen.token_id == prompt[place]
        assert part.chosen.logprob == pytest.approx(want[place - 1, prompt[place]].item(), abs=2e-3)
        assert len(part.top) == 1
    for place, (token, part) in enumerate(zip(tokens, sampled, strict=True), len(prompt)):
        assert (part.chosen.token_id, len(part.top)) == (token, 2)
        assert part.top[0].token_id == token
        assert part.chosen.logprob == pytest.approx(want[place - 1, token].item(), abs=2e-3)


async def test_logprobs_change_no_token(load):
    """Beside others, sampled with a seed."""
    engine = load()
    hot = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True)
    with_scores = SamplingParams(
        temperature=1.0, seed=5, max_tokens=20, ignore_eos=True, logprobs=5, prompt_logprobs=0
    )
    (_, plain, _, _), (_, scored, _, _) = await asyncio.gather(
        run(engine, PROMPT, hot), run(engine, PROMPT, with_scores)
    )
    assert plain == scored


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("min_p", 1.5),
        ("frequency_penalty", math.nan),
        ("presence_penalty", math.inf),
        ("repetition_penalty", 0),
        ("min_tokens", -1),
        ("logprobs", 21),
        ("prompt_logprobs", -1),
        ("logit_bias", ((10**9, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
    ],
)
async def test_sampling_that_cannot_be_done_is_refused_by_name(engine, name, value):
    """Before any work of the engine thread."""
    with pytest.raises(InvalidRequest) as refused:
        await run(engine, PROMPT, SamplingParams(**{name: value}))
    assert refused.value.param == name


async def test_piece_has_its_bytes(engine):
    """Half characters can be joined from the bytes of their tokens."""
    text = "naïve 你好 😀 <|end|>"
    encoder = engine._encoder
    ids = encoder._backend.encode(text, add_special_tokens=False).ids
    assert b"".join(encoder.piece(token)[1] for token in ids).decode() == text
