"""The one contract between HTTP, Ray and the model: requests in, deltas out.

The engine implements `LLMEngine`, the Serve handle implements it (`ingress.py`), the test
double implements it. Only plain, picklable data is named here; nothing is imported but the
standard library.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, TypeAlias


class FinishReason(StrEnum):
    """Why a completion ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the model's chat template.

    Args:
        messages: OpenAI-shaped messages, content already flattened to text, oldest first.
        template_kwargs: extra variables for the chat template.
    """

    messages: tuple[dict[str, Any], ...]
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A plain prompt; the tokenizer adds its special tokens."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt of token ids, taken as they are."""

    token_ids: tuple[int, ...]


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request picks its tokens.

    Args:
        max_tokens: completion limit; None fills the context window.
        temperature: >= 0; 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: keep the k most likely; 0 is off.
        seed: makes the result repeatable whatever else runs; None draws one.
        stop: strings that end the completion; they are not part of its text.
        stop_token_ids: ids that end the completion like an end-of-sequence token.
        ignore_eos: go on after the model's own end-of-sequence tokens.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, one completion.

    Args:
        request_id: unique while the request runs; the key for cancelling it.
        prompt: what to continue.
        sampling: how to pick tokens.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What was generated since the previous delta.

    Args:
        text: new text, whole UTF-8 characters only; may be empty.
        token_ids: the new ids.
        finish_reason: set on the last delta and only there.
        usage: running totals of the request, so the last delta carries the final ones.
    """

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason | None = None


class LLMEngine(Protocol):
    """A model that continues prompts."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Continue one prompt.

        Yields at least one delta; exactly the last one has a `finish_reason`. Closing the
        iterator (or cancelling the task that reads it) frees the request within one step.

        Raises:
            RequestError: before any delta, when the request cannot be done.
            Overloaded: before any delta, when the queue is full.
            EngineError: at any time, once, as the end of the stream.
        """
        ...

    async def ready(self) -> bool:
        """Tell whether a request sent now would be answered."""
        ...
