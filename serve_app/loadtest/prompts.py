"""Texts of a wanted number of tokens for a model whose tokenizer the client does not have.

Two short requests tell how many tokens the template costs and how many a word; the rest is
counting. What a prompt really was is read from the answer's `usage`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from serve_app.loadtest.stage import Shot

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
