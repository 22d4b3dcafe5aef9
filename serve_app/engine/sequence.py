"""One request as the engine thread sees it: token ids, progress, its place in the cache."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from serve_app.engine.cache.allocator import BLOCK_TOKENS, Region
from serve_app.engine.cache.prefix_cache import Holding, extend_chain
from serve_app.protocol import FinishReason, Priority, SamplingParams, Timing

if TYPE_CHECKING:
    from serve_app.engine.grammar.matcher import Matcher
    from serve_app.engine.model.logits_processors import Adjuster
    from serve_app.engine.speculative import Drafter
    from serve_app.engine.text.reasoning import Thinking


@dataclass(frozen=True, slots=True)
class SamplingPlan(SamplingParams):
    """The `SamplingParams` of one sequence, with every default resolved.

    Args:
        seed: 64 bits; with a token's index it fixes that token's noise.
        stop_token_ids: as in `SamplingParams`, the model's own ones included.
        is_seeded: the seed is the client's.
    """

    seed: int = 0
    is_seeded: bool = False

    @classmethod
    def of(cls, params: SamplingParams, **resolved: Any) -> SamplingPlan:
        """Return a request's parameters, but for those that are given here."""
        return cls(**{each.name: getattr(params, each.name) for each in fields(params)} | resolved)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is drawn, but for a structure."""
        return (
            bool(self.logit_bias or self.min_tokens)
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
            or self.repetition_penalty != 1
        )

    def of_completion(self, index: int) -> SamplingPlan:
        """Return the plan of one of several completions of a prompt."""
        if not index:
            return self
        return replace(self, seed=(self.seed + index) % 2**64, prompt_logprobs=None)


@dataclass(slots=True)
class Sequence:
    """A prompt and what was sampled after it.

    Args:
        key: unique in this engine, in order of arrival.
        tokens: prompt first, sampled ones appended.
        prompt_tokens: how many of them are the prompt, >= 1.
        max_tokens: sampled tokens at the most, >= 1.
        sampling: how to pick tokens.
        client: who sent it; clients take turns.
        adapter: that it is computed with; "" is none.
        priority: before and behind whom it goes.
        request: what it belongs to, the key of its first sequence; requests take turns.
        reuse: whether a cached beginning may be used; not where every logit is asked for.
        parent: computes the same prompt; this one waits for it and copies.
        computed: tokens whose K and V are in the cache; the next step starts there.
        cached: prompt tokens that were found computed; None before the first admission.
        holding: the place in the cache; None while waiting.
        chain: digests of the first blocks, as far as they were needed.
        suspect: ran in a step that failed; its next one is for it alone.
        scored: prompt tokens after the first whose logprobs are known.
        matcher: its walk through the structure that it must have; None leaves it free.
        thinking: what it begins with, where thoughts are separated from answers.
        adjuster: what else changes its logits; made when first needed.
        drafter: guesses its next tokens; made when first needed.
        arrived_s: on the monotonic clock, as the next three.
        began_s: its first step; 0 before.
        first_s: its first token; 0 before.
        latest_s: its latest token; 0 before.
    """

    key: int
    tokens: list[int]
    prompt_tokens: int
    max_tokens: int
    sampling: SamplingPlan
    client: str = ""
    adapter: str = ""
    priority: Priority = Priority.NORMAL
    request: int = -1
    reuse: bool = True
    parent: Sequence | None = None
    computed: int = 0
    cached: int | None = None
    holding: Holding | None = None
    chain: list[bytes] = field(default_factory=list)
    suspect: bool = False
    scored: int = 0
    matcher: Matcher | None = None
    thinking: Thinking | None = None
    adjuster: Adjuster | None = None
    drafter: Drafter | None = None
    arrived_s: float = field(default_factory=time.monotonic)
    began_s: float = 0.0
    first_s: float = 0.0
    latest_s: float = 0.0

    def __post_init__(self) -> None:
        """Make one that belongs to nothing else a request of its own."""
        if self.request < 0:
            self.request = self.key

    @property
    def waits_for_parent(self) -> bool:
        """Whether the prompt is being computed by another completion of the request."""
        parent = self.parent
        return (
            parent is not None
            and parent.holding is not None
            and parent.computed < parent.prompt_tokens
        )

    @property
    def region(self) -> Region | None:
        """The place in the cache; None while waiting."""
        return None if self.holding is None else self.holding.region

    @property
    def timing(self) -> Timing:
        """Where its time went so far; any thread."""
        latest, first, began = self.latest_s, self.first_s, self.began_s
        return Timing(
            queue_s=max(0.0, began - self.arrived_s),
            prefill_s=max(0.0, first - began),
            decode_s=max(0.0, latest - first),
        )

    def digests(self, tokens: int) -> list[bytes]:
        """Return the digests of the whole blocks of the first `tokens` tokens."""
        blocks = tokens // BLOCK_TOKENS
        extend_chain(self.chain, self.tokens, blocks)
        return self.chain[:blocks]

    @property
    def limit(self) -> int:
        """Tokens that the sequence can reach, prompt and completion."""
        return self.prompt_tokens + self.max_tokens

    @property
    def generated(self) -> int:
        """Tokens sampled so far; the index of the next one."""
        return len(self.tokens) - self.prompt_tokens

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is drawn."""
        return self.sampling.adjusts or self.matcher is not None

    @property
    def sits_out(self) -> bool:
        """Whether its next token has to wait for a mask; another step may have it in time."""
        return self.matcher is not None and self.matcher.sits_out

    @property
    def wants_scores(self) -> bool:
        """Whether prompt tokens are left whose logprobs were asked for."""
        return self.sampling.prompt_logprobs is not None and self.scored < self.prompt_tokens - 1

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be sampled, >= 1; 1 is a decode row."""
        return len(self.tokens) - self.computed

    def append(self, token: int) -> FinishReason | None:
        """Take a sampled token; return whether it was the last."""
        self.tokens.append(token)
        if token in self.sampling.stop_token_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.limit else None


@dataclass(frozen=True, slots=True)
class Score:
    """A token's logprob and the most likely ones in its place, by id, most likely first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Update:
    """What a step did to one sequence.

    Args:
        key: the sequence.
        token: the sampled id, if one was.
        finish_reason: set when this was the end.
        fault: set when the sequence failed, and it alone; a sentence.
        refused: the fault is the client's: its structure cannot be enforced any further.
        score: of the sampled id, if it was asked for.
        prompt: of the prompt's tokens that this step computed, if they were.
    """

    key: int
    token: int | None = None
    finish_reason: FinishReason | None = None
    fault: str | None = None
    refused: bool = False
    score: Score | None = None
    prompt: tuple[Score, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """Tokens `start` to `start + count - 1` of a sequence, computed in one step.

    Args:
        kept: how many of them, from the end, need logits: 0 while a prompt goes on, 1 where the
            next token is sampled, all where a prompt's logprobs are asked for or guesses are
            checked.
        drafts: guesses of the next tokens, the last ones of `count`.
    """

    sequence: Sequence
    start: int
    count: int
    kept: int
    drafts: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """The tokens to compute."""
        known = self.sequence.tokens[self.start : self.start + self.count - len(self.drafts)]
        return [*known, *self.drafts] if self.drafts else known

    @property
    def samples(self) -> bool:
        """Whether the sequence's last token is among them, so that the next one is sampled."""
        return self.start + self.count - len(self.drafts) == len(self.sequence.tokens)

    @property
    def place(self) -> int:
        """Where the sequence's region of the cache starts.

        Raises:
            ValueError: it has none; the bookkeeping of the caller is broken.
        """
        if self.sequence.holding is None:
            raise ValueError(f"sequence {self.sequence.key} has no place in the cache")
        return self.sequence.holding.region.start


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a row gave.

    Args:
        tokens: the sampled id and, behind it, those that were guessed right; empty if the row
            does not sample.
        broken: its logits are not finite.
        late: its mask was not there in time, so its last token has to be computed once more.
        refused: why its structure cannot be enforced any further; a sentence.
        score: see `Update`, as `prompt`.
    """

    row: Row
    tokens: tuple[int, ...] = ()
    broken: bool = False
    late: bool = False
    refused: str | None = None
    score: Score | None = None
    prompt: tuple[Score, ...] = ()


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
