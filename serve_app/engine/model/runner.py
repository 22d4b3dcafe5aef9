"""One step: rows in the pool's order through the forward, then a token for each that samples."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Protocol

import torch

from serve_app.engine.grammar import matcher as grammars
from serve_app.engine.model import sampling
from serve_app.engine.model.logits_processors import adjusted
from serve_app.engine.model.openmp import end_workers
from serve_app.engine.sequence import Move, Row, Sampled, Score, Sequence, StepPlan

# A mask takes a fraction of a millisecond and is computed beside the forward. A step waits so
# long at the most for all that are late; those that still are sit out.
MASK_WAIT_S = 0.02


class Forward(Protocol):
    """The model with its KV cache; used by one thread."""

    def move(self, moves: tuple[Move, ...]) -> None:
        """Copy K and V within the cache, in order."""
        ...

    def logits(self, rows: list[Row]) -> torch.Tensor:
        """Compute rows as one batch and keep their K and V.

        Args:
            rows: at least one, in the order of their places in the cache.

        Returns:
            Of each row's last `kept` tokens, row by row, (sum of kept, vocabulary).
        """
        ...


class Runner:
    """Computes plans; used by one thread.

    Args:
        forward: the model.
    """

    def __init__(self, forward: Forward) -> None:
        # torch keeps this number by thread: a new one would start with a thread for each core.
        self._threads = torch.get_num_threads()
        self._forward = forward

    def enter_thread(self) -> None:
        """Give the calling thread the number of threads that was set when this was made."""
        torch.set_num_threads(self._threads)

    def leave_thread(self) -> None:
        """End the calling thread's OpenMP workers: another thread computes from now on."""
        end_workers()

    @torch.inference_mode()
    def step(self, plan: StepPlan) -> list[Sampled]:
        """Compute a plan; returns what every row with logits gave."""
        self._forward.move(plan.moves)
        if not plan.rows:
            return []
        # In the order of the pool, so that a backend may read starts as cumulated lengths.
        rows = sorted(plan.rows, key=_place)
        logits = self._forward.logits(rows)
        kept = [row for row in rows if row.kept]
        if not kept:
            return []
        # `logits` is one tensor of all rows' kept positions; row i's end at ends[i].
        ends = list(itertools.accumulate(row.kept for row in kept))
        drawn = [
            place
            for row, end in zip(kept, ends, strict=True)
            if row.samples
            for place in range(end - 1 - len(row.drafts), end)
        ]
        # Without scored prompts every position is drawn from, and no copy is needed.
        last = logits if len(drawn) == len(logits) else logits[drawn]
        results = dict(
            zip(
                (row.sequence.key for row in kept if row.samples),
                _draw(last, [row for row in kept if row.samples]),
                strict=True,
            )
        )
        for row, end in zip(kept, ends, strict=True):
            if row.sequence.wants_scores:
                # A chunk in the middle of a scored prompt draws no token.
                result = results.get(row.sequence.key) or Sampled(row)
                scores = _prompt_scores(logits[end - row.kept : end], row)
                results[row.sequence.key] = replace(result, prompt=scores)
        return list(results.values())


def _draw(logits: torch.Tensor, rows: list[Row]) -> list[Sampled]:
    """Pick a token for each row, and one for each of its guesses.

    Args:
        logits: float, (rows and their guesses, vocabulary).
        rows: those that sample.
    """
    if not rows:
        return []
    absent = _without_mask(rows)
    if absent:
        kept = [
            place
            for place, row in enumerate(row for row in rows for _ in range(1 + len(row.drafts)))
            if row.sequence.key not in absent
        ]
        logits = logits[kept]
    present = iter(_sample(logits, [row for row in rows if row.sequence.key not in absent]))
    return [absent.get(row.sequence.key) or next(present) for row in rows]


def _without_mask(rows: list[Row]) -> dict[int, Sampled]:
    """Wait for masks, and return what becomes of the rows that have none, by sequence."""
    walks = [(row, row.sequence.matcher) for row in rows if row.sequence.matcher is not None]
    grammars.wait([matcher for _, matcher in walks], MASK_WAIT_S)
    absent = {}
    for row, matcher in walks:
        if matcher.fault is not None:
            absent[row.sequence.key] = Sampled(row, refused=matcher.fault)
        elif matcher.pending:
            matcher.was_late()
            absent[row.sequence.key] = Sampled(row, late=True)
    return absent


def _sample(logits: torch.Tensor, rows: list[Row]) -> list[Sampled]:
    """Pick a token for each row, and one for each of its guesses; all masks are there."""
    if not rows:
        return []
    places = [(row.sequence, guess) for row in rows for guess in range(1 + len(row.drafts))]
    sequences = [sequence for sequence, _ in places]
    # Asked before the masks, which write infinities of their own.
    finite_rows = sampling.finite(logits)
    drawn = sampling.sample(
        adjusted(logits, sequences),
        [sequence.sampling for sequence in sequences],
        [sequence.generated + guess for sequence, guess in places],
    )
    # One wait for the device.
    tokens, finite = torch.stack((drawn, finite_rows.to(drawn.dtype))).tolist()
    scores = _scores(logits, sequences, tokens)
    results = []
    first = 0
    for row in rows:
        # A guess counts while all before it were what the model itself drew, and the token drawn
        # after the last right one is free.
        count = 1 + _right(row.drafts, tokens[first:])
        if all(finite[first : first + count]):
            sampled = tuple(tokens[first : first + count])
            # No guesses are made where scores are asked for, so the first place is the only one.
            results.append(Sampled(row, sampled, score=scores.get(first)))
        else:
            results.append(Sampled(row, broken=True))
        first += 1 + len(row.drafts)
    return results


def _right(drafts: tuple[int, ...], tokens: list[int]) -> int:
    """Count the guesses that are what was sampled, up to the first that is not."""
    right = 0
    while right < len(drafts) and drafts[right] == tokens[right]:
        right += 1
    return right


def _scores(logits: torch.Tensor, sequences: list[Sequence], tokens: list[int]) -> dict[int, Score]:
    """Score the sampled tokens of the rows that ask for it, by row."""
    asked = [i for i, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    if not asked:
        return {}
    counts = [sequences[i].sampling.logprobs or 0 for i in asked]
    scored = sampling.score(logits[asked], [tokens[i] for i in asked], counts)
    return dict(zip(asked, scored, strict=True))


def _prompt_scores(logits: torch.Tensor, row: Row) -> tuple[Score, ...]:
    """Score the prompt's tokens that follow those of a row, but for those already scored."""
    sequence = row.sequence
    begin = row.start + row.count - row.kept
    # One that was put back computes its prompt again; what has been sent is not sent twice.
    first = max(begin, sequence.scored)
    end = min(row.start + row.count, sequence.prompt_tokens - 1)
    if first >= end:
        return ()
    wanted = sequence.tokens[first + 1 : end + 1]
    count = sequence.sampling.prompt_logprobs or 0
    part = logits[first - begin : end - begin]
    return tuple(sampling.score(part, wanted, [count] * len(wanted)))


def _place(row: Row) -> int:
    return row.place
