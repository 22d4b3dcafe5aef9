"""How long prompts and completions are: a fixed number, a distribution, or pairs of a file."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from serve_app.errors import ConfigError

Draw = Callable[[random.Random], int]
_NUMBER = r"(\d+(?:\.\d+)?)"
_FORMS = "write it as 256, 64-512, normal:512,128 or lognormal:512,0.8"


def parse(text: str) -> Draw:
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
