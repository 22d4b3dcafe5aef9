"""A walk that begins behind a model's thoughts, which are free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from serve_app.engine.grammar.matcher import Matcher, Worker
from serve_app.engine.text.reasoning import CLOSE, Thinking

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Thoughts:
    """What may come before the structure.

    Args:
        start: what the completion begins with; not `OVER`.
        open_id: the opening tag, where it is one token; without it a completion that does not
            begin in its thoughts has none.
        piece: a token's text.
        ends: ids that the thoughts may not hold: the answer would be missing.
    """

    start: Thinking
    open_id: int | None
    piece: Callable[[int], str]
    ends: frozenset[int]


class LateMatcher(Matcher):
    """A completion's walk: free in its thoughts, then as any other.

    Args:
        number: see `Matcher`, as the next two.
        slot: where its masks come.
        worker: walks.
        thoughts: what comes first.
    """

    __slots__ = ("_free", "_state", "_tail", "_thoughts")

    def __init__(self, number: int, slot: int, worker: Worker, *, thoughts: Thoughts) -> None:
        super().__init__(number, slot, worker)
        self._thoughts = thoughts
        self._state = thoughts.start
        self._tail = ""  # the last characters of the thoughts
        self._free = _all_but(thoughts.ends, len(super().mask))

    @property
    def mask(self) -> NDArray[np.uint8]:
        """Which tokens may come next; see `Matcher.mask`."""
        if self._state is Thinking.OPEN:
            return self._free
        mask = super().mask
        if self._state is Thinking.POSSIBLE and self._thoughts.open_id is not None:
            mask = mask.copy()
            mask[self._thoughts.open_id >> 3] |= 1 << (self._thoughts.open_id & 7)
        return mask

    def advance(self, token: int) -> None:
        """Go on with a sampled token; see `Matcher.advance`."""
        if self._state is Thinking.POSSIBLE:
            opens = token == self._thoughts.open_id
            self._state = Thinking.OPEN if opens else Thinking.OVER
            if opens:
                return
        if self._state is Thinking.OVER:
            super().advance(token)
            return
        self._tail += self._thoughts.piece(token)
        if CLOSE in self._tail:
            self._state = Thinking.OVER  # the first mask is the one that came at the beginning
        self._tail = self._tail[-len(CLOSE) :]


def _all_but(tokens: frozenset[int], size: int) -> NDArray[np.uint8]:
    mask = np.full(size, 0xFF, np.uint8)
    for token in tokens:
        if token >> 3 < size:
            mask[token >> 3] &= ~(1 << (token & 7)) & 0xFF
    return mask
