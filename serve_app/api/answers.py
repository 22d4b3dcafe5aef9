"""OpenAI's response objects, and who writes which: one voice for chat, one for completions.

The types are exact about what is null and what is absent: `logprobs` and `refusal` are
always there, `usage` stands in a stream's chunks only if it was asked for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, Protocol, TypedDict
from uuid import uuid4

from serve_app.protocol import FinishReason, Usage


class CachedTokens(TypedDict):
    """Prompt tokens that were not computed again."""

    cached_tokens: int


class UsageBody(TypedDict):
    """`CompletionUsage` of the specification."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class ChatMessage(TypedDict):
    """`ChatCompletionResponseMessage`."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    """One finished choice of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """`CreateChatCompletionResponse`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody


class ChatDelta(TypedDict, total=False):
    """`ChatCompletionStreamResponseDelta`."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChunkChoice(TypedDict):
    """What is new of one choice of a streamed chat completion."""

    index: int
    delta: ChatDelta
    logprobs: None
    finish_reason: FinishReason | None


class ChatChunk(TypedDict):
    """`CreateChatCompletionStreamResponse`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[UsageBody | None]


class TextChoice(TypedDict):
    """One choice of a completion; in a stream, what is new of it."""

    index: int
    text: str
    logprobs: None
    finish_reason: FinishReason | None


class TextCompletion(TypedDict):
    """`CreateCompletionResponse`, whole or as a chunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[UsageBody | None]


class Model(TypedDict):
    """`Model`; `max_model_len` (tokens) is what load tools look for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: NotRequired[int]


class ModelList(TypedDict):
    """`ListModelsResponse`."""

    object: Literal["list"]
    data: list[Model]


class Voice(Protocol):
    """Writes the answers of one API request; every object it writes has the same id."""

    def whole(
        self, texts: Sequence[str], reasons: Sequence[FinishReason], usage: Usage
    ) -> Mapping[str, object]:
        """Return the complete answer, choices in the order of their indexes."""
        ...

    def first(self, index: int) -> Mapping[str, object] | None:
        """Return the chunk that opens a choice, if this endpoint has one."""
        ...

    def text(self, index: int, text: str) -> Mapping[str, object]:
        """Return a chunk of new text."""
        ...

    def finish(self, index: int, reason: FinishReason) -> Mapping[str, object]:
        """Return the chunk that ends a choice."""
        ...

    def end(self) -> Mapping[str, object]:
        """Return the chunk without choices that carries the usage of the whole stream."""
        ...


@dataclass(frozen=True, slots=True)
class ChatVoice:
    """Writes chat completions."""

    model: str
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, texts: Sequence[str], reasons: Sequence[FinishReason], usage: Usage
    ) -> ChatCompletion:
        """Return the complete answer."""
        choices = [
            ChatChoice(
                index=index,
                message={"role": "assistant", "content": text, "refusal": None},
                logprobs=None,
                finish_reason=reason,
            )
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "usage": usage_body(usage),
        }

    def first(self, index: int) -> ChatChunk:
        """Return the chunk that tells the role."""
        return self._chunk(index, {"role": "assistant", "content": "", "refusal": None}, None)

    def text(self, index: int, text: str) -> ChatChunk:
        """Return a chunk of new text."""
        return self._chunk(index, {"content": text}, None)

    def finish(self, index: int, reason: FinishReason) -> ChatChunk:
        """Return the chunk that ends a choice."""
        return self._chunk(index, {}, reason)

    def end(self) -> ChatChunk:
        """Return a chunk without choices."""
        return {
            "id": self.id,
            "object": "chat.completion.chunk",
            "created": self.created,
            "model": self.model,
            "choices": [],
        }

    def _chunk(self, index: int, delta: ChatDelta, reason: FinishReason | None) -> ChatChunk:
        chunk = self.end()
        chunk["choices"] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        ]
        return chunk


@dataclass(frozen=True, slots=True)
class CompletionVoice:
    """Writes completions; its chunks have the shape of the whole."""

    model: str
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, texts: Sequence[str], reasons: Sequence[FinishReason], usage: Usage
    ) -> TextCompletion:
        """Return the complete answer."""
        body = self.end()
        body["choices"] = [
            {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        body["usage"] = usage_body(usage)
        return body

    def first(self, index: int) -> None:
        """Return nothing: a completion has no role to tell."""

    def text(self, index: int, text: str) -> TextCompletion:
        """Return a chunk of new text."""
        return self._chunk(index, text, None)

    def finish(self, index: int, reason: FinishReason) -> TextCompletion:
        """Return the chunk that ends a choice."""
        return self._chunk(index, "", reason)

    def end(self) -> TextCompletion:
        """Return a chunk without choices."""
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [],
        }

    def _chunk(self, index: int, text: str, reason: FinishReason | None) -> TextCompletion:
        chunk = self.end()
        chunk["choices"] = [
            {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        ]
        return chunk


def usage_body(usage: Usage) -> UsageBody:
    """Return the specification's form of a usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
