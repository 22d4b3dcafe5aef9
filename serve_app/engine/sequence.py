"""One request as the engine thread sees it: token ids, progress, its place in the cache."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.engine.regions import Region
from serve_app.protocol import FinishReason


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How to pick the tokens of one sequence, with every default resolved.

    Args:
        temperature: >= 0; 0 is greedy.
        top_p: in (0, 1]; 1 is off.
        top_k: >= 0; 0 is off.
        seed: 64 bits; with a token's index it fixes that token's noise.
        stop_token_ids: ids that end the sequence, the model's own ones included.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_token_ids: frozenset[int]


@dataclass(slots=True)
class Sequence:
    """A prompt and what was sampled after it.

    Args:
        key: unique in this engine, in order of arrival.
        tokens: prompt first, sampled ones appended.
        prompt_tokens: how many of them are the prompt, >= 1.
        max_tokens: sampled tokens at the most, >= 1.
        sampling: how to pick tokens.
        computed: tokens whose K and V are in the cache; the next step starts there.
        region: the place in the cache; None while waiting.
    """

    key: int
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    sampling: SamplingPlan
    computed: int = 0
    region: Region | None = None

    @property
    def limit(self) -> int:
        """Tokens that the sequence can reach, prompt and completion."""
        return self.prompt_tokens + self.max_tokens

    @property
    def generated(self) -> int:
        """Tokens sampled so far; the index of the next one."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be sampled, >= 1; 1 is a decode row."""
        return len(self.tokens) - self.computed

    def append(self, token: int) -> FinishReason | None:
        """Take a sampled token and tell whether it was the last."""
        self.tokens.append(token)
        if token in self.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.limit else None


@dataclass(frozen=True, slots=True)
class Update:
    """What a step did to one sequence.

    Args:
        key: the sequence.
        token: the sampled id, if one was.
        finish_reason: set when this was the end.
        fault: set when the sequence failed, and it alone; a sentence.
    """

    key: int
    token: int | None = None
    finish_reason: FinishReason | None = None
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens `start` to `start + count - 1` of a sequence, computed in one step.

    Args:
        kept: how many of them, from the end, need logits: 0 while a prompt goes on, 1 where the
            next token is sampled.
    """

    sequence: Sequence
    start: int
    count: int
    kept: int

    @property
    def place(self) -> int:
        """Where the sequence's region of the cache starts.

        Raises:
            ValueError: it has none; the bookkeeping of the caller is broken.
        """
        if self.sequence.region is None:
            raise ValueError(f"sequence {self.sequence.key} has no place in the cache")
        return self.sequence.region.start


@dataclass(frozen=True, slots=True)
class Move:
    """K and V to copy within the cache before the step; the two places may not overlap."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The work of one forward: `moves` first, then all `rows` packed together."""

    rows: tuple[Row, ...] = ()
    moves: tuple[Move, ...] = field(default=())
