"""The requests that every contender gets: fixed lengths, text as prompts, greedy, no end.

Imports nothing but the standard library: it also runs in the peers' own environments.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Tokens of prompt and completion: 4,728 and 2,180 in all.
LENGTHS = (
    (134, 88), (165, 41), (149, 64), (200, 43), (70, 56), (209, 125), (81, 66), (150, 46),
    (76, 76), (204, 100), (50, 118), (210, 37), (21, 54), (112, 81), (226, 39), (237, 60),
    (177, 16), (131, 102), (249, 99), (76, 65), (114, 60), (166, 72), (48, 20), (183, 73),
    (99, 47), (250, 91), (133, 48), (45, 88), (239, 70), (256, 62), (103, 45), (165, 128),
)  # fmt: skip
STEADY = ((1000, 200),)  # as load tests of GPUs have it
ALONE = 6  # requests of the run with one stream


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt and how many tokens to continue it by, whatever they are."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Stream:
    """What came of one request.

    Args:
        ids: of the completion.
        times: when each arrived, in seconds after the run began.
    """

    ids: list[int]
    times: list[float]


def window_of(lengths: Sequence[tuple[int, int]]) -> int:
    """Return a window that holds the longest request, in tokens, a multiple of 128."""
    return -(-max(map(sum, lengths)) // 128) * 128


def make(
    text: list[int], *, streams: int, turn: int, lengths: Sequence[tuple[int, int]] = LENGTHS
) -> list[Request]:
    """Cut prompts out of a text.

    Args:
        text: ids, more than the longest prompt.
        streams: how many run at once, up to 512; 1 is the first few, one after the other.
        turn: from 1, distinguishes the runs of a benchmark. No two prompts begin with the same
            token, or a cache of prefixes would skip the work.
        lengths: tokens of prompt and completion, in turn.
    """
    draw = random.Random(turn)  # noqa: S311 (repeatable on purpose)
    requests = []
    for index in range(ALONE if streams == 1 else streams):
        length, max_tokens = lengths[index % len(lengths)]
        start = draw.randrange(len(text) - length)
        prompt = (512 * turn + index, *text[start + 1 : start + length])
        requests.append(Request(prompt, max_tokens))
    return requests
