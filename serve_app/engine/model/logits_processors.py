"""What a request does to its logits before a token is drawn: bias, penalties, bans, structure.

The state follows the request's tokens and nothing else, so it survives being put back, and a
row costs nothing unless it asks for something.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch

from serve_app.engine.sequence import SamplingPlan, Sequence

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Adjuster:
    """The adjustments of one sequence.

    Args:
        plan: the request's.
        vocabulary: columns of the logits.
        device: where they lie.
    """

    def __init__(self, plan: SamplingPlan, vocabulary: int, device: torch.device) -> None:
        self._plan = plan
        self._seen = 0
        self._penalises = plan.frequency_penalty != 0 or plan.presence_penalty != 0
        self._counts = torch.zeros(vocabulary if self._penalises else 0, device=device)
        self._repeats = plan.repetition_penalty != 1
        self._used = torch.zeros(
            vocabulary if self._repeats else 0, dtype=torch.bool, device=device
        )
        self._bias = (
            torch.tensor([token for token, _ in plan.logit_bias], device=device),
            torch.tensor([value for _, value in plan.logit_bias], device=device),
        )
        self._ends = torch.tensor(sorted(plan.stop_token_ids), device=device, dtype=torch.int64)

    def apply(self, logits: torch.Tensor, sequence: Sequence) -> None:
        """Change one row in place, in the order of vLLM: bias, penalties, then what may not be.

        Args:
            logits: float32, (vocabulary,).
            sequence: whose row it is.
        """
        self._follow(sequence.tokens, sequence.prompt_tokens)
        plan = self._plan
        if plan.logit_bias:
            tokens, values = self._bias
            logits.index_add_(0, tokens, values)
        if self._repeats:
            factor = plan.repetition_penalty
            changed = torch.where(logits > 0, logits / factor, logits * factor)
            torch.where(self._used, changed, logits, out=logits)
        if self._penalises:
            logits -= plan.frequency_penalty * self._counts
            logits -= plan.presence_penalty * (self._counts > 0)
        # Under a structure the mask bans the ends, unless nothing else may come.
        if sequence.generated < plan.min_tokens and sequence.matcher is None:
            logits[self._ends] = -torch.inf

    def _follow(self, tokens: list[int], prompt_tokens: int) -> None:
        """Count the tokens that came since the last row."""
        sampled = tokens[max(self._seen, prompt_tokens) :]
        if self._penalises and sampled:
            places = torch.tensor(sampled, device=self._counts.device)
            self._counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float32))
        if self._repeats:
            self._used[torch.tensor(tokens[self._seen :], device=self._used.device)] = True
        self._seen = len(tokens)


def adjusted(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Return the logits to draw from; the given ones are not changed.

    Args:
        logits: float, (rows, vocabulary).
        sequences: one for each row; the masks of those with a structure are there.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence.adjusts]
    if not rows:
        return logits
    logits = logits.to(torch.float32, copy=True)
    for row in rows:
        sequence = sequences[row]
        if not sequence.sampling.adjusts:
            continue
        if sequence.adjuster is None:
            sequence.adjuster = Adjuster(sequence.sampling, logits.shape[1], logits.device)
        sequence.adjuster.apply(logits[row], sequence)
    structured = [row for row in rows if sequences[row].matcher is not None]
    if structured:
        banned = _banned([sequences[row] for row in structured], logits.shape[1])
        places = torch.tensor(structured, device=logits.device)
        logits[places] = logits[places].masked_fill_(banned.to(logits.device), -torch.inf)
    return logits


def _banned(sequences: list[Sequence], vocabulary: int) -> torch.Tensor:
    """Return which tokens may not come; bool, (sequences, vocabulary), on the CPU.

    Before `min_tokens` the ends are banned as well, unless the structure is complete: then
    nothing else may come, and a completion that is shorter is better than none.
    """
    rows = []
    for sequence in sequences:
        assert sequence.matcher is not None  # noqa: S101 - the caller's choice
        bits = sequence.matcher.mask
        if sequence.generated < sequence.sampling.min_tokens:
            bits = _without(bits, sequence.sampling.stop_token_ids)
        rows.append(bits)
    allowed = np.unpackbits(np.stack(rows), axis=1, bitorder="little", count=vocabulary)
    return torch.from_numpy(allowed == 0)


def _without(bits: NDArray[np.uint8], tokens: Iterable[int]) -> NDArray[np.uint8]:
    left = bits.copy()
    for token in tokens:
        left[token >> 3] &= ~(1 << (token & 7)) & 0xFF
    return left if left.any() else bits
