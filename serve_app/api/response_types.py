"""OpenAI's response objects, and the `ChunkWriter` that writes those of one request.

The types are exact about what is null and what is absent: `logprobs` and `refusal` are
always there, `usage` stands in a stream's chunks only if it was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NotRequired, Protocol, TypeAlias, TypedDict

from serve_app.api.choices import Piece
from serve_app.api.logprobs import ChatLogprobs, CompletionLogprobs
from serve_app.protocol import FinishReason, Usage

ChatFinish: TypeAlias = FinishReason | Literal["tool_calls"]


class CachedTokens(TypedDict):
    """Prompt tokens that were not computed again."""

    cached_tokens: int


class UsageBody(TypedDict):
    """`CompletionUsage` of the specification."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class FunctionBody(TypedDict):
    """Which function is called, and with what, as JSON."""

    name: str
    arguments: str


class ToolCallBody(TypedDict):
    """`ChatCompletionMessageToolCall`."""

    id: str
    type: Literal["function"]
    function: FunctionBody


class FunctionPiece(TypedDict, total=False):
    """The name comes once, with the first piece of a call."""

    name: str
    arguments: str


class ToolCallPiece(TypedDict):
    """`ChatCompletionMessageToolCallChunk`; id, type and name come with the first one."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionPiece


class ChatMessage(TypedDict):
    """`ChatCompletionResponseMessage`."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallBody]]


class ChatChoice(TypedDict):
    """One finished choice of a chat completion."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """`CreateChatCompletionResponse`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_token_ids: NotRequired[list[int]]


class ChatDelta(TypedDict, total=False):
    """`ChatCompletionStreamResponseDelta`."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str
    tool_calls: list[ToolCallPiece]


class ChatChunkChoice(TypedDict):
    """What is new of one choice of a streamed chat completion."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinish | None
    token_ids: NotRequired[list[int]]


class ChatChunk(TypedDict):
    """`CreateChatCompletionStreamResponse`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[UsageBody | None]
    prompt_token_ids: NotRequired[list[int]]


class TextChoice(TypedDict):
    """One choice of a completion; in a stream, what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class TextCompletion(TypedDict):
    """`CreateCompletionResponse`, whole or as a chunk."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: NotRequired[UsageBody | None]


class Model(TypedDict):
    """`Model`; `max_model_len` (tokens) is what load tools look for, `parent` an adapter's base."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: NotRequired[int]
    parent: NotRequired[str]


class ChunkWriter(Protocol):
    """Writes the answers of one request in OpenAI's older form: chunks of one id."""

    def full_body(self, pieces: Sequence[Piece], usage: Usage) -> Mapping[str, object]:
        """Return the complete answer: one piece for each choice, by index."""
        ...

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """Return the chunks of a piece: opening, text and finish, as far as there are."""
        ...

    def end(self) -> Mapping[str, object]:
        """Return the chunk without choices that carries the usage of the whole stream."""
        ...


def usage_body(usage: Usage) -> UsageBody:
    """Return the specification's form of a usage."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
