"""Validate a request and turn its prompt into token ids.

Everything a client can get wrong is refused here, before any work of the engine thread, so
that nothing it computes depends on a client's good will.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from serve_app.engine.defaults import resolved
from serve_app.engine.grammar.late import Thoughts
from serve_app.engine.sampling_rules import check_sampling
from serve_app.engine.sequence import SamplingPlan
from serve_app.engine.text.conversation import ChatRenderer
from serve_app.engine.text.detokenizer import Decode
from serve_app.engine.text.reasoning import CLOSE, OPEN, Thinking, thinking_after
from serve_app.engine.text.special_tokens import SpecialTokens, describe_tokenizer
from serve_app.engine.text.text_work import INLINE_CHARS, TextLimit, TextWork
from serve_app.errors import ContextLengthExceeded, InvalidRequest
from serve_app.protocol import (
    ChatPrompt,
    GenerationRequest,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
)


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A request that the engine can do.

    Args:
        tokens: the prompt's ids, shape (prompt_tokens,), each within the vocabulary.
        max_tokens: completion tokens at the most; prompt and completion fit the window.
        sampling: with every default resolved.
        continues: the completion continues the prompt's text (it is no chat answer), so the
            prompt's end decides on spaces before its first word.
        thinking: what the completion begins with, where thoughts are separated from answers.
        stop_strings: stop strings that are special tokens, by id.
    """

    tokens: list[int]
    max_tokens: int
    sampling: SamplingPlan
    continues: bool
    thinking: Thinking | None = None
    stop_strings: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Encoded:
    ids: list[int]
    thinking: Thinking | None = None


class PromptEncoder:
    """Turns requests into ids under one model's rules.

    Args:
        tokenizer: transformers' tokenizer, backed by the `tokenizers` library.
        vocab_size: rows of the embedding; ids are below it.
        max_context_tokens: prompt and completion together.
        eos_token_ids: the model's own end-of-sequence ids.
        defaults: of sampling parameters, for requests that are silent about them.
        reasoning: separate a chat answer's thoughts from the answer.
        trust_templates: take a chat template that comes with a request.
    """

    def __init__(  # noqa: PLR0913 - one model's rules, by keyword
        self,
        tokenizer: Any,
        *,
        vocab_size: int,
        max_context_tokens: int,
        eos_token_ids: frozenset[int],
        defaults: Mapping[str, float] = MappingProxyType({}),
        reasoning: bool = False,
        trust_templates: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        # The library's own object is used directly: it never changes while threads share it.
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocab_size = vocab_size
        self._max_context_tokens = max_context_tokens
        self.eos_token_ids = eos_token_ids
        self._special = SpecialTokens(self._backend)
        self._limit = TextLimit(self._backend, max_context_tokens)
        self._work = TextWork()
        self._defaults = defaults
        self._reasoning = reasoning
        self.conversations = ChatRenderer(tokenizer, trust_templates=trust_templates)

    async def encode(self, request: GenerationRequest) -> EncodedRequest:
        """Check and encode; long prompts are encoded off the event loop, a few at a time.

        Raises:
            Overloaded: too much text waits to be encoded.
            InvalidRequest: an empty prompt, an id outside the vocabulary, a sampling
                parameter out of range, a conversation that the chat template refuses.
            ContextLengthExceeded: prompt and completion do not fit the window.
        """
        return await self._work.run(_size(request.prompt), self.encode_now, request)

    def encode_now(self, request: GenerationRequest) -> EncodedRequest:
        """Check and encode on the calling thread; see `encode`."""
        params = resolved(request.sampling, self._defaults)
        check_sampling(params, self.vocab_size)
        encoded = self._tokens(request.prompt, has_to_fit=True)
        return EncodedRequest(
            tokens=encoded.ids,
            max_tokens=self._max_tokens(len(encoded.ids), request),
            sampling=self._plan(params),
            continues=not _begins_an_answer(request.prompt),
            thinking=encoded.thinking,
            stop_strings=self._special.stop_ids(params.stop),
        )

    def dump_tokenizer(self) -> str:
        """Return the tokenizer's JSON, with tokens that its other files add."""
        text: str = self._backend.to_str()
        return text

    async def tokenize(self, prompt: Prompt) -> list[int]:
        """Return a prompt's ids; long ones are encoded off the event loop, a few at a time.

        Raises:
            Overloaded: too much text waits to be encoded.
            InvalidRequest: an empty prompt, an id outside the vocabulary, a conversation that
                the chat template refuses.
            ContextLengthExceeded: too many characters for any text that fits the window.
        """
        return (await self._work.run(_size(prompt), self._tokens, prompt)).ids

    async def detokenize(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens included; long ones as in `tokenize`.

        Raises:
            Overloaded: too much text waits.
            InvalidRequest: an id outside the vocabulary.
        """
        return await self._work.run(len(ids), self._decode_all, ids)

    def close(self) -> None:
        """Encode nothing more."""
        self._work.close()

    async def strings(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return each id as the vocabulary writes it; a row that no token uses is empty.

        Raises:
            Overloaded: too much text waits.
            InvalidRequest: an id outside the vocabulary.
        """
        return await self._work.run(len(ids), self._names, ids)

    def tokenizer_info(self) -> dict[str, Any]:
        """Return the tokenizer's settings, and whether its template shows tools to the model."""
        shows = self.conversations.shows_tools()
        return {**describe_tokenizer(self._tokenizer), "chat_template_shows_tools": shows}

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids without special tokens."""
        text: str = self._backend.decode(ids, skip_special_tokens=True)
        return text

    def thoughts_of(self, request: EncodedRequest) -> Thoughts | None:
        """Return what a structure has to let pass before it begins; None for nothing."""
        if request.thinking in (None, Thinking.OVER):
            return None
        return Thoughts(
            start=request.thinking,
            open_id=self._special.id_of(OPEN),
            piece=lambda token: self.piece(token)[0],
            ends=self.eos_token_ids,
        )

    def decoder(self, params: SamplingParams) -> Decode:
        """Return the decoder of a completion: its ids to the text that was asked for."""
        tags = (OPEN, CLOSE) if self._reasoning else ()
        return self._special.decoder(
            skip=params.skip_special_tokens, keep=(*params.keep_special_tokens, *tags)
        )

    def piece(self, token: int) -> tuple[str, bytes]:
        """Return one id's text, half characters as U+FFFD, and its bytes."""
        return self._special.piece(token)

    def _decode_all(self, ids: Sequence[int]) -> str:
        # The batched call leaves the interpreter lock, and it alone.
        (text,) = self._backend.decode_batch([self._checked(ids)], skip_special_tokens=False)
        return str(text)

    def _names(self, ids: Sequence[int]) -> tuple[str, ...]:
        return tuple(self._backend.id_to_token(id_) or "" for id_ in self._checked(ids))

    def _tokens(self, prompt: Prompt, *, has_to_fit: bool = False) -> _Encoded:
        """Return a prompt's ids.

        Args:
            prompt: what to encode.
            has_to_fit: stop as soon as it is known that they do not fit the window.
        """
        limit = prompt.truncate
        if limit is not None and limit < 0:
            limit = max(1, self._max_context_tokens + limit)
        if isinstance(prompt, TokenPrompt):
            return _Encoded(self._checked(prompt.token_ids[-limit:] if limit else prompt.token_ids))
        text, thinking = self._text(prompt)
        param = "messages" if isinstance(prompt, ChatPrompt) else "prompt"
        self._limit.require_length(len(text), param=param)
        if has_to_fit and limit is None:
            self._limit.require_tokens(text, param=param)
        ids = self._special.encode(text, add=prompt.add_special_tokens, limit=limit)
        return _Encoded(self._checked(ids), thinking)

    def _text(self, prompt: ChatPrompt | TextPrompt) -> tuple[str, Thinking | None]:
        if isinstance(prompt, TextPrompt):
            return prompt.text, None
        text = self.conversations.render(prompt)
        if not self._reasoning:
            return text, None
        return text, thinking_after(text, continues=prompt.continue_final_message)

    def _checked(self, ids: Sequence[int]) -> list[int]:
        if not ids:
            raise InvalidRequest("The prompt is empty.", param="prompt")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            raise InvalidRequest(
                f"The prompt holds an id outside the vocabulary (0 to {self.vocab_size - 1}).",
                param="prompt",
            )
        return list(ids)

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
        return SamplingPlan.of(
            params,
            # A k at or above the vocabulary keeps everything.
            top_k=params.top_k if params.top_k < self.vocab_size else 0,
            seed=seed % 2**64,
            is_seeded=params.seed is not None,
            stop_token_ids=own.union(params.stop_token_ids, self._special.stop_ids(params.stop)),
        )


def _begins_an_answer(prompt: Prompt) -> bool:
    return isinstance(prompt, ChatPrompt) and not prompt.continue_final_message


def _size(prompt: Prompt) -> int:
    """Return about how many characters, or ids, a prompt holds."""
    if isinstance(prompt, ChatPrompt) and prompt.chat_template is not None:
        return INLINE_CHARS + 1  # an unknown program; it may take long over little
    if isinstance(prompt, TextPrompt):
        return len(prompt.text)
    if isinstance(prompt, TokenPrompt):
        return len(prompt.token_ids)
    return sum(map(_chars, (*prompt.messages, *prompt.tools)))


def _chars(value: object) -> int:
    """Return the characters of what a template may show, at least one for each value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):  # of JSON; asking for a `Mapping` costs most of the time
        return sum(len(str(key)) + _chars(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return sum(map(_chars, value))
    return 1
