"""Requests are checked and encoded before the engine does any work."""

import json
import math
import threading

import pytest
from tokenizers.processors import TemplateProcessing

from serve_app.engine.text import text_work
from serve_app.engine.text.conversation import RESERVED
from serve_app.engine.text.prompt import PromptEncoder
from serve_app.errors import ContextLengthExceeded, InvalidRequest
from serve_app.protocol import (
    ChatPrompt,
    GenerationRequest,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)
from tests.models import VOCAB, make_tokenizer

TOKENIZER = make_tokenizer()
HELLO = ChatPrompt(({"role": "user", "content": "Hello"},))


def encoder(tokenizer=TOKENIZER, window=64):
    return PromptEncoder(
        tokenizer, vocab_size=VOCAB, max_context_tokens=window, eos_token_ids=frozenset({0, 5})
    )


def encode(prompt, window=64, tokenizer=TOKENIZER, **sampling):
    request = GenerationRequest("r", prompt, SamplingParams(**sampling))
    return encoder(tokenizer, window).encode_now(request)


def test_encode_renders_a_conversation_by_the_template():
    """Ids are those of transformers' own `apply_chat_template`, ready for the answer."""
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    expected = TOKENIZER.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False
    )
    encoded = encode(ChatPrompt(tuple(messages)))
    assert encoded.tokens == expected
    assert not encoded.continues


def test_encode_hands_template_variables_to_the_template():
    """`add_generation_prompt` may be switched off."""
    closed = encode(ChatPrompt(HELLO.messages, {"add_generation_prompt": False}))
    assert encode(HELLO).tokens[: len(closed.tokens)] == closed.tokens
    assert len(encode(HELLO).tokens) > len(closed.tokens)


def test_encode_hands_tools_to_the_template():
    """As the client defined them; without any, the template sees none."""
    showing = make_tokenizer()
    showing.chat_template = "{{ tools | tojson if tools else 'none' }}"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    shown = encode(ChatPrompt(HELLO.messages, tools=(tool,)), 512, showing).tokens
    assert json.loads(showing.decode(shown)) == [tool]
    assert showing.decode(encode(HELLO, tokenizer=showing).tokens) == "none"


def test_encode_continues_a_final_message():
    """The prompt ends with its last word, and what follows continues that text."""
    messages = (*HELLO.messages, {"role": "assistant", "content": "I am"})
    encoded = encode(ChatPrompt(messages, continue_final_message=True))
    assert TOKENIZER.decode(encoded.tokens).endswith("<|start|>assistant\nI am")
    assert encoded.continues
    with pytest.raises(InvalidRequest):
        encode(ChatPrompt(messages, {"add_generation_prompt": True}, continue_final_message=True))


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_encode_cannot_be_steered(name):
    """A client chooses variables of the template, not another template or another output."""
    with pytest.raises(InvalidRequest, match=name) as caught:
        encode(ChatPrompt(HELLO.messages, {name: "x"}))
    assert caught.value.param == "chat_template_kwargs"


def test_encode_takes_text_and_ids_as_they_are():
    """A text gets the tokenizer's special tokens; ids are not touched."""
    assert encode(TextPrompt("Hello")).tokens == TOKENIZER("Hello").input_ids
    assert encode(TokenPrompt((7, 0, 7))).tokens == [7, 0, 7]
    assert encode(TextPrompt("Hello")).continues


def test_encode_of_an_empty_text_is_what_the_tokenizer_begins_a_text_with():
    """As vLLM and llama.cpp take it; a tokenizer that adds nothing leaves no prompt."""
    tokenizer = make_tokenizer()
    start = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", start)]
    )
    assert encode(TextPrompt(""), tokenizer=tokenizer).tokens == [start]
    with pytest.raises(InvalidRequest, match="empty"):
        encode(TextPrompt("", add_special_tokens=False), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (TextPrompt(""), "empty"),
        (TokenPrompt(()), "empty"),
        (ChatPrompt(()), "empty"),
        (TokenPrompt((1, VOCAB)), "outside the vocabulary"),
        (TokenPrompt((-1,)), "outside the vocabulary"),
        (ChatPrompt(({"role": "robot", "content": "x"},)), "unknown role"),
        (ChatPrompt(({"role": "user"},)), "refuses"),
    ],
    ids=str,
)
def test_encode_refuses_bad_prompts(prompt, words):
    """Each gets one sentence and harms nobody."""
    if words == "refuses":  # jinja2 renders a missing content as nothing, unless asked not to
        strict = make_tokenizer()
        strict.chat_template = "{{ messages[0].content + 'x' }}"
        with pytest.raises(InvalidRequest, match="refuses this conversation"):
            encode(prompt, tokenizer=strict)
        return
    with pytest.raises(InvalidRequest, match=words):
        encode(prompt)


def test_encode_without_a_template_says_where_to_go():
    """Chat needs a template; the other endpoint does not."""
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(InvalidRequest, match="no chat template"):
        encode(HELLO, tokenizer=bare)
    assert encode(TextPrompt("Hello"), tokenizer=bare).tokens


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("top_k", -1),
        ("stop", ("",)),
        ("stop_token_ids", (VOCAB,)),
        ("stop_token_ids", (-1,)),
    ],
)
def test_encode_refuses_sampling_out_of_range(name, value):
    """The message and the error name the parameter."""
    with pytest.raises(InvalidRequest, match=name) as caught:
        encode(HELLO, **{name: value})
    assert caught.value.param == name


def test_encode_shares_the_window_between_prompt_and_completion():
    """What fits exactly is taken; one token more is refused with the numbers."""
    ids = TokenPrompt(tuple(range(2, 42)))
    assert encode(ids, max_tokens=24).max_tokens == 24
    assert encode(ids).max_tokens == 24
    with pytest.raises(ContextLengthExceeded) as caught:
        encode(ids, max_tokens=25)
    assert "maximum context length is 64 tokens" in caught.value.message
    assert "you requested 65 tokens (40 in the prompt, 25 in the completion)" in str(caught.value)
    assert caught.value.details == {
        "prompt_tokens": 40,
        "max_tokens": 25,
        "max_context_tokens": 64,
    }


@pytest.mark.parametrize("limit", [None, 5])
def test_encode_refuses_a_prompt_that_fills_the_window(limit):
    """There must be room for one new token."""
    ids = TokenPrompt(tuple(range(2, 66)))
    with pytest.raises(ContextLengthExceeded, match=r"prompt resulted in 64 tokens"):
        encode(ids, max_tokens=limit)
    assert encode(TokenPrompt(ids.token_ids[:-1])).max_tokens == 1


def test_encode_resolves_defaults():
    """The model's own ends, a seed of its own, a top_k over the vocabulary off."""
    chosen = encode(HELLO, stop_token_ids=frozenset({9}), top_k=VOCAB, seed=-3).sampling
    assert chosen.stop_token_ids == {0, 5, 9}
    assert chosen.top_k == 0
    assert 0 <= chosen.seed < 2**64
    assert encode(
        HELLO, ignore_eos=True, stop_token_ids=frozenset({9})
    ).sampling.stop_token_ids == {9}
    assert len({encode(HELLO).sampling.seed for _ in range(4)}) == 4


async def test_encode_takes_long_prompts_off_the_event_loop(monkeypatch):
    """A long text is encoded on another thread, a short one where it came."""
    threads = []

    class Noting(PromptEncoder):
        def encode_now(self, request):
            threads.append(threading.current_thread())
            return super().encode_now(request)

    noting = Noting(
        TOKENIZER, vocab_size=VOCAB, max_context_tokens=100_000, eos_token_ids=frozenset()
    )
    for text in ("short", "long " * text_work.INLINE_CHARS):
        await noting.encode(GenerationRequest("r", TextPrompt(text)))
    assert threads[0] is threading.main_thread()
    assert threads[1] is not threading.main_thread()
