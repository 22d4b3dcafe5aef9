"""What a request does to its logits before a token is drawn: bias, penalties, bans, structure.

The state follows the request's tokens and nothing else, so it survives being put back, and a
row costs nothing unless it asks for something.
"""

from __future__ import annotations

import torch

from serve_app.engine.sequence import SamplingPlan, Sequence


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
        self._matcher = None if plan.grammar is None else plan.grammar.matcher()

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
        if sequence.generated < plan.min_tokens:
            logits[self._ends] = -torch.inf
        if self._matcher is not None:
            mask = self._matcher.allowed(len(logits)).to(logits.device)
            logits.masked_fill_(~mask, -torch.inf)

    def _follow(self, tokens: list[int], prompt_tokens: int) -> None:
        """Count the tokens that came since the last row."""
        sampled = tokens[max(self._seen, prompt_tokens) :]
        if self._penalises and sampled:
            places = torch.tensor(sampled, device=self._counts.device)
            self._counts.index_add_(0, places, torch.ones_like(places, dtype=torch.float32))
        if self._repeats:
            self._used[torch.tensor(tokens[self._seen :], device=self._used.device)] = True
        if self._matcher is not None:
            self._matcher.take(sampled)
        self._seen = len(tokens)


def adjusted(logits: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Return the logits to draw from; the given ones are not changed.

    Args:
        logits: float, (rows, vocabulary).
        sequences: one for each row.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence.sampling.adjusts]
    if not rows:
        return logits
    logits = logits.to(torch.float32, copy=True)
    for row in rows:
        sequence = sequences[row]
        if sequence.adjuster is None:
            sequence.adjuster = Adjuster(sequence.sampling, logits.shape[1], logits.device)
        sequence.adjuster.apply(logits[row], sequence)
    return logits
