"""Validate a request and turn its prompt into token ids.

Everything a client can get wrong is refused here, before any work of the engine thread, so
that nothing it computes depends on a client's good will.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from serve_app.engine.sequence import SamplingPlan
from serve_app.errors import ContextLengthExceeded, InvalidRequest
from serve_app.protocol import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)

MAX_LOGPROBS = 20  # as OpenAI has it
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")  # of tokenizers that fall back to bytes


def _byte_level() -> dict[str, int]:
    """Return the letters that byte-level tokenizers write for bytes, as GPT-2 chose them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_LEVEL = _byte_level()
# Above this many characters encoding takes milliseconds and leaves the event loop.
THREAD_CHARS = 8192
# Arguments of transformers' `apply_chat_template` that steer it; the rest go to the template.
RENDER_OPTIONS = frozenset({
    "conversation", "chat_template", "continue_final_message", "tokenize",
    "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "tools",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request that the engine can do.

    Args:
        tokens: the prompt's ids, shape (prompt_tokens,), each within the vocabulary.
        max_tokens: completion tokens at the most; prompt and completion fit the window.
        sampling: with every default resolved.
        continues: the completion continues the prompt's text (it is no chat answer), so the
            prompt's end decides on spaces before its first word.
    """

    tokens: list[int]
    max_tokens: int
    sampling: SamplingPlan
    continues: bool


class PromptEncoder:
    """Turns requests into ids under one model's rules.

    Args:
        tokenizer: transformers' tokenizer, backed by the `tokenizers` library.
        vocab_size: rows of the embedding; ids are below it.
        max_context_tokens: prompt and completion together.
        eos_token_ids: the model's own end-of-sequence ids.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        max_context_tokens: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self._tokenizer = tokenizer
        # The library's own object is used directly: it never changes while threads share it.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self.eos_token_ids = eos_token_ids
        self._byte_level = "ByteLevel" in str(self._backend.decoder)

    async def encode(self, request: GenerationRequest) -> EncodedRequest:
        """Check and encode; long prompts are encoded off the event loop.

        Raises:
            InvalidRequest: an empty prompt, an id outside the vocabulary, a sampling
                parameter out of range, a conversation that the chat template refuses.
            ContextLengthExceeded: prompt and completion do not fit the window.
        """
        if _chars(request.prompt) > THREAD_CHARS:
            return await asyncio.to_thread(self.encode_now, request)
        return self.encode_now(request)

    def encode_now(self, request: GenerationRequest) -> EncodedRequest:
        """Check and encode on the calling thread; see `encode`."""
        check_sampling(request.sampling, self.vocab_size)
        tokens = self._tokens(request.prompt)
        return EncodedRequest(
            tokens=tokens,
            max_tokens=self._max_tokens(len(tokens), request),
            sampling=self._plan(request.sampling),
            continues=not _begins_an_answer(request.prompt),
        )

    def dump_tokenizer(self) -> str:
        """Return the tokenizer's JSON, with tokens that its other files add."""
        text: str = self._backend.to_str()
        return text

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids; long ones are encoded off the event loop.

        Raises:
            InvalidRequest: an empty prompt, an id outside the vocabulary, a conversation that
                the chat template refuses.
        """
        if _chars(prompt) > THREAD_CHARS:
            return await asyncio.to_thread(self._tokens, prompt)
        return self._tokens(prompt)

    def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included.

        Raises:
            InvalidRequest: an id outside the vocabulary.
        """
        text: str = self._backend.decode(self._checked(ids), skip_special_tokens=False)
        return text

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids without special tokens."""
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def piece(self, token: int) -> tuple[str, bytes]:
        """Return one id's text, half characters as U+FFFD, and its bytes."""
        text: str = self._backend.decode([token], skip_special_tokens=False)
        name = self._backend.id_to_token(token)
        if name is None:  # a row of the embedding that no token uses
            return "", b""
        if self._byte_level and all(letter in BYTE_LEVEL for letter in name):
            return text, bytes(BYTE_LEVEL[letter] for letter in name)
        if match := BYTE_TOKEN.fullmatch(name):
            return text, bytes([int(match[1], 16)])
        return text, text.encode()

    def _tokens(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, ChatPrompt):
            return self._ids(self._render(prompt), add_special_tokens=False)
        if isinstance(prompt, TextPrompt):
            return self._ids(prompt.text, add_special_tokens=True)
        return self._checked(prompt.token_ids)

    def _ids(self, text: str, *, add_special_tokens: bool) -> list[int]:
        if not text:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        encoding = self._backend.encode(text, add_special_tokens=add_special_tokens)
        return self._checked(encoding.ids)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not ids:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise InvalidRequest(
                f"The prompt holds an id outside the vocabulary (0 to {self.vocab_size - 1}).",
                param="prompt",
            )
        return list(ids)

    def _render(self, prompt: ChatPrompt) -> str:
        if not prompt.messages:
            raise InvalidRequest("The conversation is empty.", param="messages")
        if not self._tokenizer.chat_template:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions instead.", param="messages"
            )
        if reserved := RENDER_OPTIONS & prompt.template_kwargs.keys():
            raise InvalidRequest(
                f"{min(reserved)} cannot be set for the chat template.",
                param="chat_template_kwargs",
            )
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(prompt.messages),
                tools=list(prompt.tools) or None,
                continue_final_message=prompt.continue_final_message,
                tokenize=False,
                **{
                    "add_generation_prompt": not prompt.continue_final_message,
                    **prompt.template_kwargs,
                },
            )
        # A template is a program of the model's author: it raises TemplateError on purpose and
        # the others when a message is not what it expects.
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise InvalidRequest(
                f"The model's chat template refuses this conversation: {error}", param="messages"
            ) from error
        return text

    def _max_tokens(self, prompt_tokens: int, request: GenerationRequest) -> int:
        window = self._max_context_tokens
        room = window - prompt_tokens
        wanted = request.sampling.max_tokens
        if room >= (wanted or 1):
            return wanted or room
        part, param = (
            ("messages", "messages")
            if isinstance(request.prompt, ChatPrompt)
            else ("prompt", "prompt")
        )
        if wanted is None or room < 1:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {window} tokens. However, your {part} "
                f"resulted in {prompt_tokens} tokens. Please reduce the length of the {part}.",
                param=param,
                prompt_tokens=prompt_tokens,
                max_context_tokens=window,
            )
        raise ContextLengthExceeded(
            f"This model's maximum context length is {window} tokens. However, you requested "
            f"{prompt_tokens + wanted} tokens ({prompt_tokens} in the {part}, {wanted} in the "
            f"completion). Please reduce the length of the {part} or of the completion.",
            param=param,
            prompt_tokens=prompt_tokens,
            max_tokens=wanted,
            max_context_tokens=window,
        )

    def _plan(self, params: SamplingParams) -> SamplingPlan:
        # What is complete under a structure has to end.
        ignores = params.ignore_eos and params.structure is None
        own = frozenset() if ignores else self.eos_token_ids
        seed = random.getrandbits(64) if params.seed is None else params.seed
        return SamplingPlan(
            temperature=params.temperature,
            top_p=params.top_p,
            # A k at or above the vocabulary keeps everything.
            top_k=params.top_k if params.top_k < self.vocab_size else 0,
            seed=seed % 2**64,
            stop_token_ids=own.union(params.stop_token_ids),
            min_p=params.min_p,
            frequency_penalty=params.frequency_penalty,
            presence_penalty=params.presence_penalty,
            repetition_penalty=params.repetition_penalty,
            logit_bias=params.logit_bias,
            min_tokens=params.min_tokens,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
        )


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Refuse parameters that no result could honour.

    Raises:
        InvalidRequest: names the parameter and its range.
    """
    rules = (
        ("max_tokens", params.max_tokens is None or params.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= params.temperature < math.inf, "a number, 0 or above"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("top_k", params.top_k >= 0, "0 (off) or above"),
        ("stop", all(params.stop), "strings of at least one character"),
        ("min_p", 0 <= params.min_p <= 1, "from 0 to 1"),
        ("frequency_penalty", math.isfinite(params.frequency_penalty), "a number"),
        ("presence_penalty", math.isfinite(params.presence_penalty), "a number"),
        ("repetition_penalty", 0 < params.repetition_penalty < math.inf, "above 0"),
        (
            "min_tokens",
            0 <= params.min_tokens <= (params.max_tokens or math.inf),
            "0 or above, and not above max_tokens",
        ),
        ("logprobs", 0 <= (params.logprobs or 0) <= MAX_LOGPROBS, f"0 to {MAX_LOGPROBS}"),
        (
            "prompt_logprobs",
            0 <= (params.prompt_logprobs or 0) <= MAX_LOGPROBS,
            f"0 to {MAX_LOGPROBS}",
        ),
        (
            "logit_bias",
            all(0 <= token < vocab_size and math.isfinite(v) for token, v in params.logit_bias),
            f"numbers for token ids from 0 to {vocab_size - 1}",
        ),
        (
            "stop_token_ids",
            all(0 <= token < vocab_size for token in params.stop_token_ids),
            f"token ids from 0 to {vocab_size - 1}",
        ),
    )
    for name, holds, words in rules:
        if not holds:
            raise InvalidRequest(f"{name} must be {words}.", param=name)


def _begins_an_answer(prompt: Prompt) -> bool:
    return isinstance(prompt, ChatPrompt) and not prompt.continue_final_message


def _chars(prompt: Prompt) -> int:
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    if isinstance(prompt, TokenPrompt):
        return 0
    return sum(len(str(part)) for part in (*prompt.messages, *prompt.tools))
