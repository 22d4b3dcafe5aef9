"""One stage of a load test: which requests are offered, when, how long they are, their text.

Open loop: every request has an intended time that no answer can move, and its latency counts
from there; a slow server cannot slow the load and so hide its own queue (coordinated
omission). Closed loop: a fixed number of clients, each waiting for its answer before it asks
again; good for throughput, blind to queueing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from serve_app.errors import ConfigError

CLOSED_LOOP_SHOTS = 512  # lengths to cycle through; every prompt's words are still its own
BLOCK_TOKENS = 512  # of one id in a Mooncake trace
# Frequent short words: one token each in the usual vocabularies.
# fmt: off
WORDS = (
    "the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "was", "with", "be", "by",
    "on", "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an",
    "they", "which", "one", "you", "were", "her", "all", "she", "there", "would", "their", "we",
    "him", "been", "has", "when", "who", "will", "more", "no", "if", "out", "so", "said", "what",
    "up", "its", "about", "into", "than", "them", "can", "only", "other", "new", "some", "could",
    "time", "these", "two", "may", "then", "do", "first", "any", "my", "now", "such", "like",
    "our", "over", "man", "me", "even", "most", "made", "after",
)
# fmt: on
Draw = Callable[[random.Random], int]
_NUMBER = r"(\d+(?:\.\d+)?)"
_FORMS = "write it as 256, 64-512, normal:512,128 or lognormal:512,0.8"


def parse_length(text: str) -> Draw:
    """Read a length in tokens: `N`, `LOW-HIGH`, `normal:MEAN,SD` or `lognormal:MEDIAN,SIGMA`.

    Returns:
        A function that draws whole numbers >= 1.

    Raises:
        ConfigError: none of these.
    """
    if match := re.fullmatch(r"(\d+)(?:-(\d+))?", text):
        low = int(match[1])
        high = int(match[2] or low)
        if 1 <= low <= high:
            return lambda rng: rng.randint(low, high)
    if match := re.fullmatch(rf"(normal|lognormal):{_NUMBER},{_NUMBER}", text):
        centre, spread = float(match[2]), float(match[3])
        if match[1] == "normal":
            return lambda rng: max(1, round(rng.gauss(centre, spread)))
        return lambda rng: max(1, round(centre * rng.lognormvariate(0, spread)))
    raise ConfigError(f"{text!r} is not a length in tokens; {_FORMS}")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Draws (prompt tokens, completion tokens).

    Args:
        prompt: draws the prompt's length.
        output: draws the completion's.
        pairs: measured pairs to draw from instead; a prompt and its answer are correlated.
    """

    prompt: Draw
    output: Draw
    pairs: Sequence[tuple[int, int]] = ()

    def draw(self, rng: random.Random) -> tuple[int, int]:
        """Draw one pair."""
        return rng.choice(self.pairs) if self.pairs else (self.prompt(rng), self.output(rng))


@dataclass(frozen=True, slots=True)
class Shot:
    """One request to send.

    Args:
        at_s: intended time after the stage's start; a closed loop does not look at it.
        prompt_tokens: length of the prompt, template included.
        output_tokens: length of the completion.
        blocks: ids of the prompt's 512-token blocks; equal ids make equal text.
        serial: number in the stage; prompts of different serials share no block.
    """

    at_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()
    serial: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """What is offered for a while.

    Args:
        name: for people.
        shots: open loop: all of them; closed loop: the lengths to cycle through.
        duration_s: for how long requests are offered.
        warmup_s: the first seconds, which are offered and not counted.
        rate: mean arrivals per second; None for a closed loop.
        concurrency: clients of a closed loop; None for an open one.
        seed: of the prompts' words.
    """

    name: str
    shots: tuple[Shot, ...]
    duration_s: float
    warmup_s: float
    rate: float | None = None
    concurrency: int | None = None
    seed: int = 0

    def part(self, index: int, of: int) -> Stage:
        """Return what one of several client processes does."""
        if self.concurrency is None:
            return replace(self, shots=self.shots[index::of])
        clients = self.concurrency // of + (index < self.concurrency % of)
        return replace(self, concurrency=clients, shots=self.shots[index::of])


@dataclass(frozen=True, slots=True)
class Span:
    """How long each stage lasts.

    Args:
        duration_s: whole length.
        warmup_s: part of it at the start that is not counted.
    """

    duration_s: float
    warmup_s: float


def poisson(rate: float, lengths: Lengths, span: Span, *, seed: int) -> Stage:
    """Plan an open loop whose arrivals are independent of each other and of the server.

    A Poisson process given its number of arrivals: these are uniform over the time. Fixing the
    number keeps the bunching and takes away the luck of a short stage, which at a hundred
    requests would offer 10 % more or less than its name says.
    """
    rng = random.Random(f"{seed}/{rate}")  # noqa: S311 - a repeatable load, not a secret
    count = max(1, round(rate * span.duration_s))
    times = sorted(rng.uniform(0, span.duration_s) for _ in range(count))
    shots = [Shot(at_s, *lengths.draw(rng), serial=serial) for serial, at_s in enumerate(times)]
    name = f"{rate:.4g} req/s"
    return Stage(name, tuple(shots), span.duration_s, span.warmup_s, rate=rate, seed=seed)


def closed(concurrency: int, lengths: Lengths, span: Span, *, seed: int) -> Stage:
    """Plan a closed loop of this many clients."""
    rng = random.Random(f"{seed}/closed")  # noqa: S311
    count = max(concurrency, CLOSED_LOOP_SHOTS)
    shots = tuple(Shot(0.0, *lengths.draw(rng), serial=i) for i in range(count))
    name = f"{concurrency} clients"
    return Stage(name, shots, span.duration_s, span.warmup_s, concurrency=concurrency, seed=seed)


def replay(name: str, shots: Sequence[Shot], span: Span, *, seed: int) -> Stage:
    """Plan an open loop at recorded times; what lies after the span is left out."""
    kept = [shot for shot in shots if shot.at_s < span.duration_s]
    duration_s = min(span.duration_s, kept[-1].at_s + 1)
    numbered = tuple(replace(shot, serial=serial) for serial, shot in enumerate(kept))
    rate = len(kept) / duration_s
    return Stage(name, numbered, duration_s, min(span.warmup_s, duration_s / 2), rate, seed=seed)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Writes prompts.

    Args:
        template_tokens: what an empty prompt costs.
        tokens_per_word: what each further word costs.
    """

    template_tokens: float = 0.0
    tokens_per_word: float = 1.0

    @classmethod
    def fitted(cls, few: tuple[int, int], many: tuple[int, int]) -> Prompts:
        """Draw the line through two measured pairs of (words, tokens)."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        # a server that counts no words (a test double) still gets some
        slope = slope if slope > 0 else 1.0
        return cls(max(0.0, few[1] - slope * few[0]), slope)

    def text(self, shot: Shot, seed: int) -> str:
        """Write the prompt of a request; the same for the same arguments, else different."""
        words = max(1, round((shot.prompt_tokens - self.template_tokens) / self.tokens_per_word))
        if not shot.blocks:
            return " ".join(some_words(words, f"{seed}/{shot.serial}"))
        return " ".join(list(self._blocks(shot))[:words])

    def _blocks(self, shot: Shot) -> Iterator[str]:
        size = round(BLOCK_TOKENS / self.tokens_per_word)
        for block in shot.blocks:
            yield from some_words(size, f"block/{block}")


def some_words(count: int, seed: str) -> list[str]:
    """Draw words; the same for the same seed."""
    return random.Random(seed).choices(WORDS, k=count)  # noqa: S311
