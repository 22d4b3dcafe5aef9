"""A model's thoughts, which come between tags before its answer.

Templates differ in who writes the opening tag: DeepSeek-R1's ends the prompt with it, Qwen 3
leaves it to the model, and writes both tags where thinking is switched off. So the end of the
prompt decides what the completion begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

import torch

OPEN, CLOSE = "<think>", "</think>"


class Thinking(Enum):
    """Where a text stands: before any thoughts, in them, behind them."""

    POSSIBLE = auto()
    OPEN = auto()
    OVER = auto()


def thinking_after(prompt: str, *, continues: bool) -> Thinking:
    """Return what a completion of a conversation's text begins with.

    Args:
        prompt: as the chat template rendered it.
        continues: it ends within an answer's own words.
    """
    end = prompt.rstrip()
    if end.endswith(OPEN):
        return Thinking.OPEN
    if end.endswith(CLOSE):
        return Thinking.OVER
    if not continues:
        return Thinking.POSSIBLE
    return Thinking.OPEN if prompt.rfind(OPEN) > prompt.rfind(CLOSE) else Thinking.OVER


class ThoughtSplitter:
    """Parts a completion's text into thoughts and answer, wherever its pieces are cut.

    White space around the tags belongs to neither.

    Args:
        start: what the text begins with.
    """

    def __init__(self, start: Thinking) -> None:
        self._state = start
        self._held = ""
        self._fresh = start is not Thinking.OVER  # white space here is the tags'

    def push(self, text: str) -> tuple[str, str]:
        """Take a piece and return what is certain: more thoughts, more of the answer."""
        self._held += text
        thoughts = ""
        if self._state is Thinking.POSSIBLE:
            self._look_for_opening()
        if self._state is Thinking.OPEN:
            thoughts = self._thoughts()
        return thoughts, self._answer() if self._state is Thinking.OVER else ""

    def flush(self) -> tuple[str, str]:
        """Return what is held when no more text comes."""
        held, self._held = self._held, ""
        return ("", held) if self._state is Thinking.POSSIBLE else (held.rstrip(), "")

    def _look_for_opening(self) -> None:
        words = self._held.lstrip()
        if words.startswith(OPEN):
            self._state, self._held = Thinking.OPEN, words[len(OPEN) :]
        elif not OPEN.startswith(words):
            self._state, self._fresh = Thinking.OVER, False

    def _thoughts(self) -> str:
        if self._fresh:
            self._held = self._held.lstrip()
        words, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._state, self._fresh, self._held = Thinking.OVER, True, rest
            return words.rstrip()
        sure = _length_before(self._held, CLOSE)
        words, self._held = self._held[:sure], self._held[sure:]
        self._fresh = self._fresh and not words
        return words

    def _answer(self) -> str:
        words = self._held.lstrip() if self._fresh else self._held
        self._held = ""
        self._fresh = self._fresh and not words
        return words


def _length_before(text: str, tag: str) -> int:
    """Return how much stands before white space and a beginning of `tag` at the text's end."""
    size = next((n for n in range(min(len(tag), len(text)), 0, -1) if text.endswith(tag[:n])), 0)
    return len(text[: len(text) - size].rstrip())


class Walk(Protocol):
    """A completion's way through a grammar; see `structure.Matcher`."""

    def take(self, tokens: list[int]) -> None: ...  # noqa: D102
    def allowed(self, vocabulary: int) -> torch.Tensor: ...  # noqa: D102


class Walkable(Protocol):
    """A compiled structure; see `structure.Grammar`."""

    def matcher(self) -> Walk: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class AfterThoughts:
    """A structure that begins behind the thoughts, which are free.

    Args:
        grammar: of the answer.
        start: what the completion begins with; not `OVER`.
        open_id: the opening tag, where it is one token.
        piece: a token's text.
        eos: ends, which the thoughts may not hold: the answer would be missing.
    """

    grammar: Walkable
    start: Thinking
    open_id: int | None
    piece: Callable[[int], str]
    eos: frozenset[int]

    def matcher(self) -> Walk:
        """Return a walk from the beginning."""
        return _LateMatcher(self)


class _LateMatcher:
    """One completion's walk: free in its thoughts, then through the grammar."""

    def __init__(self, plan: AfterThoughts) -> None:
        self._plan = plan
        self._state = plan.start
        self._walk = plan.grammar.matcher()
        self._tail = ""  # the end of the thoughts

    def take(self, tokens: list[int]) -> None:
        """Go on with sampled tokens; see `structure.Matcher.take`."""
        for place, token in enumerate(tokens):
            if self._state is Thinking.OVER:
                self._walk.take(tokens[place:])
                return
            self._pass(token)

    def allowed(self, vocabulary: int) -> torch.Tensor:
        """Return which tokens may come next; see `structure.Matcher.allowed`."""
        if self._state is Thinking.OPEN:
            mask = torch.ones(vocabulary, dtype=torch.bool)
            mask[[token for token in self._plan.eos if token < vocabulary]] = False
            return mask
        mask = self._walk.allowed(vocabulary)
        if self._state is Thinking.POSSIBLE and self._plan.open_id is not None:
            mask[self._plan.open_id] = True
        return mask

    def _pass(self, token: int) -> None:
        """Take a token that is no part of the answer, or the first one of it."""
        if self._state is Thinking.POSSIBLE:
            if token == self._plan.open_id:
                self._state = Thinking.OPEN
            else:
                self._state = Thinking.OVER
                self._walk.take([token])
            return
        self._tail += self._plan.piece(token)
        if CLOSE in self._tail:
            self._state = Thinking.OVER
        self._tail = self._tail[-len(CLOSE) :]
