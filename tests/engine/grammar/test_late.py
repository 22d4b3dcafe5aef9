"""A walk that begins behind thoughts: what may come, and from which token on it counts."""

import numpy as np

from serve_app.engine.grammar.late import LateMatcher, Thoughts
from serve_app.engine.grammar.wire import ADVANCE
from serve_app.engine.text.reasoning import Thinking

PIECES = ["<think>", "</think>", "a", "</th", "ink>\n", "{", "<eos>"]
OPEN, CLOSE, WORD, HALF, OTHER_HALF, BRACE, EOS = range(7)


class Walk:
    """A worker that allows a brace alone, and notes what it is asked."""

    fault = None

    def __init__(self):
        self.advanced = []

    def mask(self, slot):
        return np.packbits([token == BRACE for token in range(8)], bitorder="little")

    def send(self, operation, number, value):
        assert operation == ADVANCE
        self.advanced.append(value)


def walk(start, open_id=OPEN):
    worker = Walk()
    thoughts = Thoughts(start, open_id, PIECES.__getitem__, frozenset({EOS, 99}))
    return LateMatcher(1, 0, worker, thoughts=thoughts), worker.advanced


def allowed(matcher):
    bits = np.unpackbits(matcher.mask, bitorder="little", count=7)
    return {token for token in range(7) if bits[token]}


FREE = {OPEN, CLOSE, WORD, HALF, OTHER_HALF, BRACE}


def test_late_walk_leaves_thoughts_free_that_the_prompt_opened():
    """Up to the closing tag, which the structure never sees; an end may not come in them."""
    matcher, advanced = walk(Thinking.OPEN)
    for token in (WORD, BRACE, WORD):
        assert allowed(matcher) == FREE
        matcher.advance(token)
    matcher.advance(CLOSE)
    assert (allowed(matcher), advanced) == ({BRACE}, [])
    matcher.advance(BRACE)
    assert advanced == [BRACE]


def test_late_walk_begins_at_a_closing_tag_of_several_tokens():
    """Most tokenizers have it as one, not all."""
    matcher, _ = walk(Thinking.OPEN, open_id=None)
    matcher.advance(HALF)
    assert allowed(matcher) == FREE
    matcher.advance(OTHER_HALF)
    assert allowed(matcher) == {BRACE}


def test_late_walk_allows_thoughts_or_an_answer_at_once():
    """Nothing else may come first."""
    matcher, advanced = walk(Thinking.POSSIBLE)
    assert allowed(matcher) == {OPEN, BRACE}
    matcher.advance(OPEN)
    assert allowed(matcher) == FREE
    matcher.advance(CLOSE)
    assert (allowed(matcher), advanced) == ({BRACE}, [])

    matcher, advanced = walk(Thinking.POSSIBLE)
    matcher.advance(BRACE)
    assert advanced == [BRACE]
    assert allowed(matcher) == {BRACE}


def test_late_walk_without_a_token_for_the_tag_begins_at_once():
    """One that is spelled in several tokens cannot be separated from an answer's beginning."""
    matcher, _ = walk(Thinking.POSSIBLE, open_id=None)
    assert allowed(matcher) == {BRACE}
