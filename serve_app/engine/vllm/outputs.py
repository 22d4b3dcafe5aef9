"""vLLM's outputs to updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from serve_app.engine.sequence import Score, Sequence, Update
from serve_app.protocol import FinishReason

# Under a grammar vLLM's logprobs come after the mask: the forbidden have minus infinity, which
# JSON has no word for. OpenAI writes this number for what is as good as impossible.
LEAST_LOGPROB = -9999.0
# vLLM's reasons by ours; any other means that it gave the request up.
REASONS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}


def updates_of(output: Any, sequence: Sequence) -> list[Update]:
    """Return what an output adds to a sequence, and note its times in it.

    Args:
        output: vLLM's `RequestOutput` of one completion, with what is new alone.
        sequence: the completion.
    """
    _note(output, sequence)
    (part,) = output.outputs
    updates: list[Update] = []
    if output.prompt_logprobs and sequence.sampling.prompt_logprobs is not None:
        updates.append(Update(sequence.key, prompt=_prompt_scores(output, sequence)))
    tokens = list(part.token_ids)
    scores = list(part.logprobs or ())[-len(tokens) :] if tokens else []
    last = len(tokens) - 1
    for place, token in enumerate(tokens):
        reason = REASONS.get(part.finish_reason) if place == last else None
        score = None
        if scores and sequence.sampling.logprobs is not None:
            score = _score(scores[place], token, sequence.sampling.logprobs)
        updates.append(Update(sequence.key, token, reason, score=score))
    if part.finish_reason is not None and (not tokens or part.finish_reason not in REASONS):
        updates.append(Update(sequence.key, fault="vLLM gave the request up."))
    return updates


def _note(output: Any, sequence: Sequence) -> None:
    if output.num_cached_tokens is not None:
        sequence.cached = output.num_cached_tokens
    times = output.metrics
    if times is not None:  # of the same monotonic clock, read in another process
        sequence.began_s = times.scheduled_ts
        sequence.first_s = times.first_token_ts
        sequence.latest_s = times.last_token_ts


def _prompt_scores(output: Any, sequence: Sequence) -> tuple[Score, ...]:
    """Return the scores of the prompt's tokens that are new; its first one has none."""
    count = sequence.sampling.prompt_logprobs or 0
    new = [found for found in output.prompt_logprobs if found is not None]
    tokens = sequence.tokens[1 + sequence.scored :]
    sequence.scored += len(new)
    return tuple(_score(found, token, count) for token, found in zip(tokens, new, strict=False))


def _score(found: Mapping[int, Any], token: int, count: int) -> Score:
    """Return a place's score; vLLM names the most likely and the chosen, which may be neither."""
    ranked = sorted(found.items(), key=lambda item: item[1].rank)
    top = tuple((each, _bounded(entry.logprob)) for each, entry in ranked[:count])
    return Score(token, _bounded(found[token].logprob), top)


def _bounded(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
