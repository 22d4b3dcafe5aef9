"""Guess the next tokens from the text so far: what followed the same few tokens before.

Answers repeat their prompt (code, summaries, JSON). A forward of some tokens costs little more
than one of a single token while the reading of weights dominates, so guesses are checked for
nearly nothing. They change no result: each place is sampled by the request's own noise, and a
guess counts only where it is what was sampled.

Source: Saxena, "Prompt lookup decoding" (2023).
"""

from __future__ import annotations

# Tokens that must have been seen before, the longer one first.
LENGTHS = (3, 2)
# After guesses that were all wrong, so many tokens pass before the next try.
PAUSE_TOKENS = 16


class Drafter:
    """Guesses for one sequence; guesses longer while it is right, and pauses when it is not.

    Args:
        most: tokens of one guess at the most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._width = 1
        self._resume = 0  # length of the sequence at which to try again
        self._indexed = 0
        self._after: dict[tuple[int, ...], int] = {}  # a few tokens to the place behind them

    def propose(self, tokens: list[int], room: int) -> tuple[int, ...]:
        """Return up to `room` guesses of what follows; often none."""
        self._index(tokens)
        if len(tokens) < self._resume or room < 1:
            return ()
        for length in LENGTHS:
            place = self._after.get(tuple(tokens[-length:]))
            if place is not None:
                return tuple(tokens[place : place + min(self._width, room)])
        return ()

    def learn(self, proposed: int, accepted: int, tokens: int) -> None:
        """Take how many guesses were right in a sequence that now has `tokens` tokens."""
        if accepted == proposed:
            self._width = min(self._most, 2 * self._width)
        elif accepted == 0:
            self._width = 1
            self._resume = tokens + PAUSE_TOKENS
        else:
            # What was right last time is the best guess of how long to guess.
            self._width = max(1, accepted)

    def _index(self, tokens: list[int]) -> None:
        """Remember the latest place behind every few tokens, the very last ones excepted."""
        # Not the last tokens: nothing follows them yet, and they would only find themselves.
        for end in range(max(self._indexed, LENGTHS[-1]), len(tokens)):
            for length in LENGTHS:
                if end >= length:
                    self._after[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, len(tokens))
