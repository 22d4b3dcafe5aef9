"""Logits to token ids: one call for the whole batch, every row by its own rules.

The noise of a token is a function of its request's seed and its own index alone, so a result
depends neither on the neighbours in the batch nor on how often a request was put back and
computed again. A token is drawn by inverting the cumulated probabilities in the order of
ids: one uniform number a row, no noise over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from serve_app.engine.sequence import SamplingPlan, Score

# The nucleus of a language model is nearly always among its largest logits; sorting those
# alone is ten times cheaper than sorting a vocabulary. Rows of a wider one sort everything.
NUCLEUS = 1024
# 23 bits: the product with a sum stays below the sum after rounding, in float32 too.
_UNIFORM_BITS = 23
_MASK = 2**64 - 1


def finite(logits: torch.Tensor) -> torch.Tensor:
    """Return which rows of (rows, vocabulary) hold neither NaN nor an infinity; bool, (rows,)."""
    # Any of them survives a sum, so this is one pass over the logits.
    return torch.isfinite(logits.sum(dim=-1, dtype=torch.float32))


def sample(logits: torch.Tensor, plans: Rows[SamplingPlan], indices: Rows[int]) -> torch.Tensor:
    """Pick one token a row.

    Args:
        logits: float, (rows, vocabulary), any device; not changed. -inf is never picked.
        plans: one for each row.
        indices: of the token within its completion, from 0; one for each row.

    Returns:
        The ids, int64, (rows,); any, where a row holds NaN.
    """
    tokens = logits.argmax(dim=-1)
    drawn = [row for row, plan in enumerate(plans) if plan.temperature > 0]
    if drawn:
        rows = logits if len(drawn) == len(plans) else logits[drawn]
        tokens[drawn] = _draw(rows, [plans[i] for i in drawn], [indices[i] for i in drawn])
    return tokens


def score(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> list[Score]:
    """Return the logprob of a token of each row, and of the most likely ones.

    They are those of the model itself: before temperature, penalties and filters.

    Args:
        logits: float, (rows, vocabulary).
        tokens: one for each row.
        counts: alternatives for each row.
    """
    logprobs = logits.to(torch.float32).log_softmax(dim=-1)
    picked = torch.tensor(tokens, device=logits.device)[:, None]
    chosen = logprobs.gather(-1, picked)[:, 0].tolist()
    width = min(max(counts), logprobs.shape[1])
    values, ids = (part.tolist() for part in logprobs.topk(width, dim=-1))
    return [
        Score(token, value, tuple(zip(ids[row][:count], values[row][:count], strict=True)))
        for row, (token, value, count) in enumerate(zip(tokens, chosen, counts, strict=True))
    ]


def uniform(seed: int, index: int) -> float:
    """Return the noise of one token, in [0, 1): SplitMix64 at a counter.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (2014).
    """
    mixed = seed
    for _ in range(2):  # the first round spreads small seeds, the second the index
        mixed = (mixed + 0x9E3779B97F4A7C15 * (index + 1)) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        mixed ^= mixed >> 31
    return float((mixed >> (64 - _UNIFORM_BITS)) / 2**_UNIFORM_BITS)


def _draw(logits: torch.Tensor, plans: list[SamplingPlan], indices: list[int]) -> torch.Tensor:
    """Sample every row of (rows, vocabulary); returns int64, (rows,)."""
    device = logits.device
    scaled = logits.to(torch.float32)
    # The maximum becomes 0 first: a tiny temperature then sends the rest to -inf, never to NaN.
    scaled = scaled - scaled.amax(dim=-1, keepdim=True)
    scaled /= torch.tensor([[plan.temperature] for plan in plans], device=device).clamp(min=1e-30)
    if any(plan.min_p for plan in plans):
        least = torch.tensor([[plan.min_p] for plan in plans], device=device)
        # The most likely token is at 0, so its share is a distance.
        scaled.masked_fill_(scaled < least.log(), -torch.inf)
    narrow = [row for row, plan in enumerate(plans) if plan.top_k or plan.top_p < 1]
    if narrow:
        kept = _narrow(scaled[narrow], [plans[row] for row in narrow])
        scaled[narrow] = kept
    # A CPU adds up id by id. A GPU does it in an order of its own: in float32 an id of probability
    # 0 would get a share of the rounding, and what it draws would differ between runs.
    dtype = torch.float32 if device.type == "cpu" else torch.float64
    cumulated = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=dtype)
    noise = torch.tensor(
        [[uniform(plan.seed, i)] for plan, i in zip(plans, indices, strict=True)],
        dtype=dtype,
        device=device,
    )
    # The first id whose cumulated probability is above the target; one of probability 0 never is.
    target = noise * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target, right=True).clamp_(max=logits.shape[1] - 1)[:, 0]


def _narrow(scaled: torch.Tensor, plans: list[SamplingPlan]) -> torch.Tensor:
    """Send everything outside top_k, then outside the nucleus of what is left, to -inf."""
    vocabulary = scaled.shape[1]
    device = scaled.device
    top_k = torch.tensor([[plan.top_k or vocabulary] for plan in plans], device=device)
    top_p = torch.tensor([[plan.top_p] for plan in plans], device=device)
    width = min(vocabulary, max(NUCLEUS, *(plan.top_k for plan in plans)))
    floor, complete = _floor(scaled, width, top_k, top_p)
    wide = [row for row, (done,) in enumerate(complete.tolist()) if not done]
    if wide:
        floor[wide], _ = _floor(scaled[wide], vocabulary, top_k[wide], top_p[wide])
    return scaled.masked_fill(scaled < floor, -torch.inf)


def _floor(
    scaled: torch.Tensor, width: int, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find each row's least logit to keep among its `width` largest.

    Returns:
        The floor, (rows, 1), and whether `width` was enough to know it, (rows, 1).
    """
    largest = scaled.topk(width, dim=-1).values
    rank = torch.arange(width, device=scaled.device)
    in_k = rank < top_k
    # Mass of what top_k keeps: all of the row when it is off.
    total = torch.where(
        top_k < scaled.shape[1],
        largest.masked_fill(~in_k, -torch.inf).logsumexp(dim=-1, keepdim=True),
        scaled.logsumexp(dim=-1, keepdim=True),
    )
    mass = (largest - total).exp()
    # Keep a token while the mass before it is short of top_p; the first is always kept.
    keep = in_k & ((mass.cumsum(dim=-1) - mass < top_p) | (rank == 0))
    last = keep.sum(dim=-1, keepdim=True) - 1
    complete = (last < width - 1) | (top_k <= width)
    return largest.gather(-1, last), complete
