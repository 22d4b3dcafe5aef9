"""The converted tokenizer gives the ids that llama.cpp gives for the same file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

RECORDED = json.loads((Path(__file__).parent / "data" / "llamacpp_ids.json").read_text())


@pytest.fixture(scope="module")
def tokenizer(demo_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(demo_model_dir)


@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: repr(case["text"])[:30])
def test_tokenizer_gives_the_ids_of_llama_cpp(tokenizer: Any, case: dict[str, Any]):
    """Ids are equal for text, code, digits, scripts, emoji, white space and special tokens."""
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["text"]


def test_tokenizer_makes_every_digit_a_token(tokenizer: Any):
    """Digits are split one by one, which plain byte-level splitting does not do."""
    assert [tokenizer.decode([token]) for token in tokenizer.encode("2026")] == list("2026")


def test_chat_template(tokenizer: Any):
    """The template renders roles, a default system prompt and the generation prompt."""
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tokenizer_limits_and_special_tokens(tokenizer: Any):
    """The window is the model's and the end of a turn ends a completion."""
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", 2)
    assert tokenizer.pad_token_id == 2
