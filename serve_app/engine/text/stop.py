"""Stop strings in a stream of text, wherever its pieces are cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache


class StopMatcher:
    """Passes text through until a stop string begins in it.

    Text that could be the beginning of a stop string is held back until it is decided, so
    the result does not depend on how the text was cut into pieces. Each character is looked at
    once, however many stop strings there are.

    Args:
        stop: strings that end the text; empty ones are not allowed.
        include: the stop string that ended the text is part of it.
    """

    def __init__(self, stop: Sequence[str], *, include: bool = False) -> None:
        self._root = _automaton(tuple(stop))
        self._at = self._root
        self._include = include
        self._held = ""
        self.matched = False

    def push(self, text: str) -> str:
        """Take a piece and return what may be shown; after a match nothing is shown any more."""
        if self.matched:
            return ""
        text = self._held + text
        for place in range(len(self._held), len(text)):
            self._at = self._at.after(text[place])
            if length := self._at.longest:
                self.matched, self._held = True, ""
                end = place + 1
                return text[:end] if self._include else text[: end - length]
        keep = self._at.depth
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """Return what is held; the text is over and no stop string came."""
        held, self._held = self._held, ""
        return held


@dataclass(slots=True, eq=False)
class _State:
    """A beginning of stop strings that the text ends with, the longest (Aho and Corasick, 1975).

    Args:
        depth: its characters.
        longest: of the stop string that is complete here, if any; the longest of several.
        next: longer beginnings, by the character that follows.
        shorter: the next longest beginning that the text ends with.
    """

    depth: int
    longest: int = 0
    next: dict[str, _State] = field(default_factory=dict)
    shorter: _State | None = None

    def after(self, char: str) -> _State:
        """Return the state after one more character."""
        state = self
        while (longer := state.next.get(char)) is None:
            if state.shorter is None:
                return state
            state = state.shorter
        return longer


@lru_cache(maxsize=32)  # a request's completions share it
def _automaton(stop: tuple[str, ...]) -> _State:
    root = _State(0)
    for text in stop:
        state = root
        for char in text:
            if char not in state.next:
                state.next[char] = _State(state.depth + 1)
            state = state.next[char]
        state.longest = len(text)
    waiting = deque([root])
    while waiting:
        state = waiting.popleft()
        for char, longer in state.next.items():
            longer.shorter = state.shorter.after(char) if state.shorter else root
            longer.longest = longer.longest or longer.shorter.longest
            waiting.append(longer)
    return root
