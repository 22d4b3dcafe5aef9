"""A model's thoughts, which come between tags before its answer.

Templates differ in who writes the opening tag: DeepSeek-R1's ends the prompt with it, Qwen 3
leaves it to the model, and writes both tags where thinking is switched off. So the end of the
prompt decides what the completion begins with.
"""

from __future__ import annotations

from enum import Enum, auto

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
