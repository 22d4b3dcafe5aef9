"""One stage of a load test: which requests are offered, and when.

Open loop: every request has an intended time that no answer can move, and its latency counts
from there; a slow server cannot slow the load and so hide its own queue (coordinated
omission). Closed loop: a fixed number of clients, each waiting for its answer before it asks
again; good for throughput, blind to queueing.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from serve_app.loadtest.lengths import Lengths

CLOSED_LOOP_SHOTS = 512  # lengths to cycle through; every prompt's words are still its own


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
