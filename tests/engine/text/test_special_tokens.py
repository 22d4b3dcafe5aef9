"""Special tokens: which are added, which are ends, which have a text."""

import json

import pytest
from tokenizers import AddedToken, processors
from transformers import PreTrainedTokenizerFast

from serve_app.engine.text.special_tokens import SpecialTokens, describe_tokenizer
from tests.models import END, START, make_tokenizer


def tokenizer(template="<s> $A", added=()):
    made = make_tokenizer()
    made.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": ["</s>"]})
    made.add_tokens([AddedToken(text, special=special) for text, special in added])
    backend = made.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        template, special_tokens=[(text, backend.token_to_id(text)) for text in ("<s>", "</s>")]
    )
    return made


def names(made, text, **options):
    ids = SpecialTokens(made.backend_tokenizer).encode(text, **{"add": True} | options)
    return [made.backend_tokenizer.id_to_token(id_) for id_ in ids]


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("a", ["<s>", "a"]),
        ("<s>a", ["<s>", "a"]),
        ("<s><s>a", ["<s>", "<s>", "a"]),
        ("a<s>", ["<s>", "a", "<s>"]),
        ("<s>", ["<s>"]),
    ],
)
def test_encode_gives_a_text_no_second_beginning(text, seen):
    """A prompt that is templated already brings its own."""
    assert names(tokenizer(), text) == seen


def test_encode_counts_all_that_is_added_in_front_as_the_beginning():
    """Some models have two such tokens; what is added behind the text stays."""
    made = tokenizer("<s> </s> $A </s>")
    assert names(made, "a") == ["<s>", "</s>", "a", "</s>"]
    assert names(made, "<s></s>a") == ["<s>", "</s>", "a", "</s>"]
    assert names(made, "<s>a") == ["<s>", "</s>", "<s>", "a", "</s>"]


def test_encode_adds_nothing_where_that_is_not_wanted():
    """The text's own special tokens stay."""
    assert names(tokenizer(), "a", add=False) == ["a"]
    assert names(tokenizer(), "<s>a", add=False) == ["<s>", "a"]


@pytest.mark.parametrize(
    ("limit", "seen"),
    [
        (9, ["<s>", "a", "b", "c"]),
        (4, ["<s>", "a", "b", "c"]),
        (3, ["<s>", "b", "c"]),
        (2, ["<s>", "c"]),
        (1, ["<s>"]),
    ],
)
def test_encode_cuts_a_text_at_its_beginning(limit, seen):
    """The last tokens stay, and what was added in front of it."""
    made = tokenizer(added=[("a", False), ("b", False), ("c", False)])
    assert names(made, "abc", limit=limit) == seen
    assert names(made, "<s>abc", limit=limit) == seen


def test_encode_cuts_a_text_without_a_beginning_to_its_last_tokens():
    """All of them count."""
    made = tokenizer(added=[("a", False), ("b", False), ("c", False)])
    assert names(made, "abc", limit=2, add=False) == ["b", "c"]


def test_special_tokens_take_a_stop_string_that_is_one_added_token_as_an_id():
    """Special or not; a word of the vocabulary is none, a longer text neither."""
    made = tokenizer(added=[("<mark>", False)])
    special = SpecialTokens(made.backend_tokenizer)
    stop = [END, "<mark>", "a", f"{END}\n", "nowhere"]
    assert special.stop_ids(stop) == {
        made.convert_tokens_to_ids(END): END,
        made.convert_tokens_to_ids("<mark>"): "<mark>",
    }


@pytest.mark.parametrize(
    ("skip", "keep", "text"),
    [
        (True, (), "a<mark>"),
        (False, (), f"{START}a<mark>{END}"),
        (True, (END,), f"a<mark>{END}"),
        (True, ("<mark>", "nowhere"), "a<mark>"),
        (True, (START, END), f"{START}a<mark>{END}"),
        (False, (END,), f"{START}a<mark>{END}"),
    ],
)
def test_special_tokens_have_a_text_where_it_is_asked_for(skip, keep, text):
    """All of them, or some; tokens that are not special always have one."""
    made = tokenizer(added=[("<mark>", False)])
    ids = made.convert_tokens_to_ids([START, "a", "<mark>", END])
    assert SpecialTokens(made.backend_tokenizer).decoder(skip=skip, keep=keep)(ids) == text


def test_describe_tokenizer_as_json(tmp_path):
    """Its class, its special tokens and its template, and no place on the node's disk."""
    make_tokenizer().save_pretrained(tmp_path)
    seen = describe_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert seen["eos_token"] == END
    assert "messages" in seen["chat_template"]
    assert str(tmp_path) not in json.dumps(seen)
