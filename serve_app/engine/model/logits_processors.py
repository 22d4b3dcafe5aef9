"""What requests do to their logits before a token is drawn: bias, penalties, bans, structure.

The state follows a request's tokens and nothing else, so it survives being put back, and a row
costs nothing unless it asks for something. It is kept on the host and is as long as the tokens
that the request has used; a step copies what all its rows change to the device at once.
"""

from __future__ import annotations

from array import array
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
        prompt: its tokens.
    """

    def __init__(self, plan: SamplingPlan, prompt: list[int]) -> None:
        self._plan = plan
        self._penalises = plan.frequency_penalty != 0 or plan.presence_penalty != 0
        self._repeats = plan.repetition_penalty != 1
        self._seen = len(prompt)
        # Tokens used, in the order of their first use, and how often they were sampled.
        self._used = array("q", dict.fromkeys(prompt) if self._repeats else ())
        self._counts = array("q", [0] * len(self._used))
        self._places = {token: place for place, token in enumerate(self._used)}

    def bias(self) -> NDArray[np.float64]:
        """Return (token, value) of what is added first, (2, tokens)."""
        return np.array(self._plan.logit_bias, np.float64).reshape(-1, 2).T

    def penalties(self, sequence: Sequence) -> NDArray[np.float64]:
        """Return (token, factor, amount) of what is made less likely, (3, tokens)."""
        if not (self._penalises or self._repeats):
            return np.empty((3, 0))
        self._follow(sequence.tokens)
        plan = self._plan
        counts = np.array(self._counts, np.float64)
        amounts = plan.frequency_penalty * counts + plan.presence_penalty * (counts > 0)
        factors = np.full(len(counts), plan.repetition_penalty)
        return np.stack((np.array(self._used, np.float64), factors, amounts))

    def bans(self, sequence: Sequence) -> NDArray[np.float64]:
        """Return the tokens that may not come, (1, tokens)."""
        plan = self._plan
        # Under a structure the mask bans the ends, unless nothing else may come.
        early = sequence.generated < plan.min_tokens and sequence.matcher is None
        return np.array([sorted(plan.stop_token_ids) if early else ()], np.float64).reshape(1, -1)

    def _follow(self, tokens: list[int]) -> None:
        """Count the tokens that came since the last row."""
        for token in tokens[self._seen :]:
            place = self._places.setdefault(token, len(self._used))
            if place == len(self._used):
                self._used.append(token)
                self._counts.append(0)
            self._counts[place] += 1
        self._seen = len(tokens)


def adjusted(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Return the logits to draw from; the given ones are not changed.

    Args:
        logits: float, (rows, vocabulary).
        sequences: one for each row; the masks of those with a structure are there.
    """
    if not any(sequence.adjusts for sequence in sequences):
        return logits
    logits = logits.to(torch.float32, copy=True).contiguous()
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.adjusts]
    if rows:
        _change(logits, rows, [sequences[row] for row in rows])
    structured = [row for row, sequence in enumerate(sequences) if sequence.matcher is not None]
    if structured:
        banned = _banned([sequences[row] for row in structured], logits)
        if len(structured) == len(sequences):
            logits.masked_fill_(banned, -torch.inf)
        else:
            places = torch.tensor(structured, device=logits.device)
            logits[places] = logits[places].masked_fill_(banned, -torch.inf)
    return logits


def _change(logits: torch.Tensor, rows: list[int], sequences: list[Sequence]) -> None:
    """Change rows in place, in the order of vLLM: bias, penalties, then what may not be.

    Args:
        logits: float32, (all rows, vocabulary), contiguous.
        rows: those to change.
        sequences: whose they are.
    """
    kinds: tuple[list[NDArray[np.float64]], ...] = ([], [], [])
    for row, sequence in zip(rows, sequences, strict=True):
        if sequence.adjuster is None:
            prompt = sequence.tokens[: sequence.prompt_tokens]
            sequence.adjuster = Adjuster(sequence.sampling, prompt)
        adjuster = sequence.adjuster
        parts = (adjuster.bias(), adjuster.penalties(sequence), adjuster.bans(sequence))
        for kind, part in zip(kinds, parts, strict=True):
            part[0] += row * logits.shape[1]
            kind.append(part)
    entries = [np.concatenate(kind, axis=1) for kind in kinds]
    sizes = [kind.shape[1] for kind in entries]
    table = np.zeros((3, sum(sizes)))  # float64 holds every place in the logits
    for entry, end in zip(entries, np.cumsum(sizes), strict=True):
        table[: len(entry), end - entry.shape[1] : end] = entry
    bias, penalties, bans = torch.from_numpy(table).to(logits.device).split(sizes, dim=1)
    flat = logits.view(-1)
    if sizes[0]:
        flat.index_add_(0, bias[0].long(), bias[1].float())
    if sizes[1]:
        places, factors, amounts = penalties[0].long(), penalties[1].float(), penalties[2].float()
        values = flat.index_select(0, places)
        values = torch.where(values > 0, values / factors, values * factors) - amounts
        flat.index_copy_(0, places, values)
    if sizes[2]:
        flat.index_fill_(0, bans[0].long(), -torch.inf)


def _banned(sequences: list[Sequence], logits: torch.Tensor) -> torch.Tensor:
    """Return which tokens may not come; bool, (sequences, vocabulary), on the logits' device.

    Before `min_tokens` the ends are banned as well, unless the structure is complete: then
    nothing else may come, and a completion that is shorter is better than none.
    """
    vocabulary = logits.shape[1]
    rows = np.zeros((len(sequences), -(-vocabulary // 8)), np.uint8)
    for row, sequence in zip(rows, sequences, strict=True):
        assert sequence.matcher is not None  # noqa: S101 - the caller's choice
        bits = sequence.matcher.mask[: len(row)]
        if sequence.generated < sequence.sampling.min_tokens:
            bits = _without(bits, sequence.sampling.stop_token_ids)
        row[: len(bits)] = bits
    # Bits are an eighth of what bytes would be to copy.
    allowed = torch.from_numpy(rows).to(logits.device)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    return ((allowed[:, :, None] >> shifts) & 1).view(len(sequences), -1)[:, :vocabulary] == 0


def _without(bits: NDArray[np.uint8], tokens: Iterable[int]) -> NDArray[np.uint8]:
    left = bits.copy()
    for token in tokens:
        left[token >> 3] &= ~(1 << (token & 7)) & 0xFF
    return left if left.any() else bits
