"""Ids back to text, a few at a time: the same text, whole characters only."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from serve_app.engine.text.detokenizer import REPLACEMENT, Detokenizer
from tests.models import VOCAB, make_tokenizer

BACKEND = make_tokenizer().backend_tokenizer


def decode(ids):
    return BACKEND.decode(ids, skip_special_tokens=True)


def stream(ids, context=()):
    detokenizer = Detokenizer(decode, context)
    pieces = [detokenizer.push(token) for token in ids]
    return pieces, detokenizer.flush()


@given(st.text(st.characters(exclude_characters=REPLACEMENT, codec="utf-8"), max_size=40))
def test_detokenizer_gives_text_back_whole(text):
    """Pieces join to the text and none ends within a character."""
    pieces, rest = stream(BACKEND.encode(text).ids)
    assert "".join(pieces) + rest == text.replace("<|end|>", "").replace("<|start|>", "")
    assert all(REPLACEMENT not in piece for piece in pieces)


@settings(max_examples=300)
@given(st.lists(st.integers(2, VOCAB - 1), max_size=15))
def test_detokenizer_loses_of_random_ids_only_the_unfinished_end(ids):
    """Invalid bytes in the middle come as in one decoding of all; an unfinished end is left out."""
    pieces, rest = stream(ids)
    assert "".join(pieces) + rest == decode(ids).rstrip(REPLACEMENT)


def test_detokenizer_gives_an_emoji_of_several_ids_as_one_piece():
    """Nothing is shown until the last byte is there."""
    ids = BACKEND.encode("𐎠").ids
    assert len(ids) == 4
    assert stream(ids) == (["", "", "", "𐎠"], "")
    assert stream(ids[:3]) == (["", "", ""], "")


def test_detokenizer_skips_special_tokens():
    """They are skipped, wherever they stand, and however many."""
    ids = [0, 1, *BACKEND.encode("fox").ids, *[0] * 50, *BACKEND.encode("dog").ids]
    pieces, rest = stream(ids)
    assert "".join(pieces) + rest == "foxdog"


def test_detokenizer_decides_on_the_first_space_by_the_context():
    """A tokenizer that marks spaces before words gives one only after another word."""
    vocab = {"▁The": 0, "▁capital": 1, "▁Paris": 2}
    words = Tokenizer(models.WordLevel(vocab, unk_token="▁The"))
    words.decoder = decoders.Metaspace()

    def join(ids):
        return words.decode(ids)

    assert Detokenizer(join, [0, 1]).push(2) == " Paris"
    assert Detokenizer(join).push(2) == "Paris"


def test_detokenizer_does_not_hold_endless_invalid_bytes_for_ever():
    """A model that says nonsense is shown as nonsense, in bounded memory."""
    byte = BACKEND.encode("𐎠").ids[1]
    detokenizer = Detokenizer(decode)
    shown = "".join(detokenizer.push(byte) for _ in range(100))
    assert set(shown) == {REPLACEMENT}
    assert len(detokenizer._ids) < 40
