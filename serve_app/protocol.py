"""The one contract between HTTP, Ray and the model: requests in, deltas out.

The engine implements `LLMEngine`, the Serve handle implements it (`engine_client.py`), the test
double implements it. Only plain, picklable data is named here; nothing is imported but the
standard library.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Literal, Protocol, TypeAlias


class FinishReason(StrEnum):
    """Why a completion ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class Priority(IntEnum):
    """Whose request begins first, and stays where there is no room for all: the smaller."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation for the model's chat template.

    Args:
        messages: OpenAI-shaped messages, content already flattened to text, oldest first.
        template_kwargs: extra variables for the chat template.
        tools: OpenAI-shaped tool definitions, shown to the model by its chat template.
        continue_final_message: the last message is the beginning of the answer.
        chat_template: to use in place of the model's, where the engine trusts it.
        add_special_tokens: add those that the tokenizer puts around a text; the template writes
            its own.
        truncate: see `TextPrompt`.
    """

    messages: tuple[dict[str, Any], ...]
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    tools: tuple[dict[str, Any], ...] = ()
    continue_final_message: bool = False
    chat_template: str | None = None
    add_special_tokens: bool = False
    truncate: int | None = None


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """A plain prompt.

    Args:
        text: at least one character.
        add_special_tokens: add those that the tokenizer puts around a text, unless the text
            begins with them.
        truncate: keep this many tokens, the last ones; below 0, as many as leave room for so
            many of the completion; None refuses what is too long.
    """

    text: str
    add_special_tokens: bool = True
    truncate: int | None = None


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    """A prompt of token ids, taken as they are; `truncate` as in `TextPrompt`."""

    token_ids: tuple[int, ...]
    truncate: int | None = None


Prompt: TypeAlias = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """A prompt as the model reads it.

    Args:
        token_ids: shape (prompt_tokens,).
        max_context_tokens: the model's window here, prompt and completion together.
    """

    token_ids: tuple[int, ...]
    max_context_tokens: int


@dataclass(frozen=True, slots=True)
class Structure:
    """What the completion's text must look like, enforced token by token.

    Args:
        kind: which language `definition` is in. `json_object` has none, `choice` is a JSON
            list of strings, `json_schema` a JSON schema as text, `grammar` one in Lark's syntax.
        definition: the text of the schema, expression or grammar.
        strict: refuse a JSON schema of which something cannot be enforced; otherwise that is left
            to whoever reads the answer. A subschema may say otherwise, see `SUBSCHEMA`.
    """

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    definition: str = ""
    strict: bool = False


# A keyword for a part of a JSON schema that is somebody's own, as each of several tools':
# {"strict": bool, "name": what to call it in an error, "id": the `$id` that it came with}.
SUBSCHEMA = "x-serve-app"


# Parameters for which a model's authors may publish defaults; those that vLLM takes over.
MODEL_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request picks its tokens.

    Args:
        max_tokens: completion limit; None fills the context window.
        temperature: >= 0; 0 is greedy.
        top_p: nucleus mass in (0, 1]; 1 is off.
        top_k: keep the k most likely; 0 is off.
        seed: makes the result repeatable whatever else runs; None draws one.
        stop: strings that end the completion; they are not part of its text. One that is
            exactly a special token ends it as an id, too.
        stop_token_ids: ids that end the completion like an end-of-sequence token.
        ignore_eos: go on after the model's own end-of-sequence tokens.
        min_p: drop tokens less likely than this share of the most likely one's; 0 is off.
        frequency_penalty: taken from a token's logit once per earlier use in the completion.
        presence_penalty: taken once if the token was used in the completion at all.
        repetition_penalty: > 0; divides positive and multiplies negative logits of tokens of
            prompt and completion; 1 is off.
        logit_bias: pairs of id and what is added to its logit.
        min_tokens: no end-of-sequence or stop id before this many tokens.
        logprobs: how many alternatives to report for each sampled token; 0 reports the
            sampled one alone, None nothing.
        prompt_logprobs: the same for the prompt's tokens.
        structure: what the text must look like; None leaves it free.
        include_stop: the text ends with the stop string, or the text of the stop token.
        skip_special_tokens: special tokens have no text.
        keep_special_tokens: those that have a text nevertheless.
        return_prompt_ids: the first delta has the prompt's ids.
        split_thoughts: thoughts are not part of the text, where the engine separates them.
        unset: those of `MODEL_DEFAULTS` that the client left out; a default that the model's
            authors publish replaces theirs.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structure: Structure | None = None
    include_stop: bool = False
    skip_special_tokens: bool = True
    keep_special_tokens: tuple[str, ...] = ()
    return_prompt_ids: bool = False
    split_thoughts: bool = True
    unset: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, `n` completions that share its computation.

    Args:
        request_id: unique while the request runs; the key for cancelling it.
        prompt: what to continue.
        sampling: how to pick tokens; completion `i` of a seeded request uses seed + i.
        n: completions, >= 1.
        client: who sent it: clients take turns. No secret; "" is a client like any other.
        adapter: name of the LoRA adapter to answer with; "" is the model itself.
        priority: before and behind whom it goes.
    """

    request_id: str
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    client: str = ""
    adapter: str = ""
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token and its probability under the model, before temperature and filters.

    Args:
        token_id: the id.
        text: its text alone; half a character shows as U+FFFD.
        raw: its bytes, so that half characters can be joined.
        logprob: natural logarithm, <= 0.
    """

    token_id: int
    text: str
    raw: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """A token of the completion or the prompt, and the most likely ones in its place.

    Args:
        chosen: the token itself; None for the first token of a prompt, which has none.
        top: as many alternatives as were asked for, most likely first.
    """

    chosen: Logprob | None
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that one completion spent so far.

    Args:
        queue_s: from arrival to the first step that computed something of it.
        prefill_s: from there to its first token.
        decode_s: from its first token to its latest.
    """

    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """What was generated for one completion since its previous delta.

    Args:
        text: new text, whole UTF-8 characters only; may be empty.
        token_ids: the new ids.
        usage: running totals of this completion, so its last delta carries the final ones.
        finish_reason: set on the completion's last delta and only there.
        index: which of the request's completions, from 0.
        logprobs: one for each of `token_ids`, if they were asked for.
        prompt_logprobs: one for each token of the prompt, on the first delta of index 0.
        timing: running totals of this completion.
        reasoning: new text of the model's thoughts, which come before `text`.
        prompt_token_ids: the prompt, on a completion's first delta, if it was asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    usage: Usage
    finish_reason: FinishReason | None = None
    index: int = 0
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    timing: Timing = Timing()
    reasoning: str = ""
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life between two deltas of a stream, from a replica that has taken it on."""


class LLMEngine(Protocol):
    """A model that continues prompts."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Continue one prompt.

        Each of the request's completions ends with exactly one delta that has a
        `finish_reason`; the iterator ends with the last of them. Closing the iterator (or
        cancelling the task that reads it) frees the request within one step.

        Raises:
            RequestError: before any delta, when the request cannot be done.
            Overloaded: before any delta, when the queue is full.
            EngineError: at any time, once, as the end of the stream.
        """
        ...

    async def ready(self) -> bool:
        """Return whether a request sent now would be answered."""
        ...

    async def tokenize(self, prompt: Prompt) -> PromptTokens:
        """Return the ids that `generate` would continue, and the window they have to fit.

        Raises:
            RequestError: the prompt cannot be encoded; its length is not checked.
        """
        ...

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Return the text of ids, special tokens included.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        ...

    async def token_strings(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """Return each id as the tokenizer's vocabulary writes it.

        Raises:
            RequestError: an id is outside the vocabulary.
        """
        ...

    async def tokenizer_info(self) -> dict[str, Any]:
        """Return the tokenizer's class, settings and chat template, as JSON data."""
        ...
