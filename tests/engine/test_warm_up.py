"""The first generation: as short as it may be, and a text."""

import itertools

import pytest

from serve_app.engine.sequence import Update
from serve_app.engine.text.prompt import PromptEncoder
from serve_app.engine.warm_up import TOKENS, warm_up
from serve_app.errors import ModelLoadError
from tests.models import VOCAB, make_tokenizer

SPECIAL, LETTER = 0, 70


class Loop:
    """Says what it is made with, as far as it is asked."""

    def __init__(self, *tokens):
        self.tokens, self.asked = tokens, []

    def run_alone(self, sequence):
        """Return one update for each token."""
        self.asked.append((sequence.key, sequence.max_tokens))
        return [Update(sequence.key, token) for token in self.tokens[: sequence.max_tokens]]


@pytest.fixture(scope="module")
def encoder():
    """A real tokenizer's."""
    return PromptEncoder(
        make_tokenizer(), vocab_size=VOCAB, max_context_tokens=64, eos_token_ids=frozenset({0})
    )


def test_warm_up_ends_with_the_first_decode_step(encoder):
    """A model that begins with a text is not asked for more."""
    loop = Loop(*[LETTER] * 8)
    warm_up(loop, encoder, keys=itertools.count(5))
    assert loop.asked == [(5, 2)]


def test_warm_up_waits_for_a_text(encoder):
    """One that begins with special tokens is asked again for more; ever longer is in vain."""
    loop = Loop(*[SPECIAL] * 7, LETTER)
    warm_up(loop, encoder, keys=itertools.count(5))
    assert loop.asked == [(5, TOKENS[0]), (6, TOKENS[1])]
    with pytest.raises(ModelLoadError, match="empty text"):
        warm_up(Loop(*[SPECIAL] * 8), encoder, keys=itertools.count())


def test_warm_up_asks_an_adapter_for_no_text(encoder):
    """It may have been made for labels; a fault in its step counts."""
    loop = Loop(SPECIAL, SPECIAL)
    warm_up(loop, encoder, keys=itertools.count(), adapter="x")
    assert loop.asked == [(0, 2)]
    loop.run_alone = lambda sequence: [Update(sequence.key, fault="nothing fits")]
    with pytest.raises(ModelLoadError, match=r"with adapter x .* nothing fits"):
        warm_up(loop, encoder, keys=itertools.count(), adapter="x")
