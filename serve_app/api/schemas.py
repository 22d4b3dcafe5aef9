"""What a request may look like: types and ranges, and messages that name the field.

Values are strict, null means absent, and no message ever quotes what the client sent.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from serve_app.api.messages import Message, Schema, at_most
from serve_app.api.structured_output import (
    GuidedChoice,
    GuidedGrammar,
    GuidedJson,
    GuidedRegex,
    ResponseFormat,
    StructuredOutputs,
)
from serve_app.api.tools import Tool, ToolChoice, check_tools
from serve_app.api.validation import validate
from serve_app.protocol import Structure, TextPrompt, TokenPrompt

__all__ = ["ChatRequest", "CompletionRequest", "SamplingFields", "StreamOptions", "validate"]

MAX_CHOICES = 128  # OpenAI's limit of `n`; here also of prompts times n
MAX_MESSAGES = 8192  # OpenAI takes 2,048; more than any window holds are no conversation
MAX_LOGPROBS = 20  # OpenAI's limit of a chat; vLLM takes as many of a completion
UNLIMITED = -1  # llama.cpp's and LM Studio's word for as many tokens as fit
MAX_TOKEN_ID = 2**31 - 1
MAX_TOOLS = 128  # OpenAI's limit
COMPLETION_MAX_TOKENS = 16  # OpenAI's default of /v1/completions; chat has none
STRUCTURES = (
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "json_schema",
    "regex",
)
MAX_STOPS = 128
MAX_STOP_CHARS = 1024  # of one, and sixteen times as many of all
_MAX_BIASES = 1024
_TOKEN_ID = re.compile(r"\d{1,10}", re.ASCII)


def _stops(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(stop, str) for stop in value):
        raise ValueError("must be a string or a list of strings")
    stops = tuple(dict.fromkeys(stop for stop in value if stop))  # an empty one stops nothing
    if len(value) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"at most {MAX_STOPS} strings of {MAX_STOP_CHARS} characters")
    if sum(map(len, stops)) > 16 * MAX_STOP_CHARS:
        raise ValueError(f"at most {16 * MAX_STOP_CHARS} characters in all")
    return stops


def _biases(value: object) -> object:
    """Turn ids in quotes, which is all that JSON's keys can be, into numbers."""
    if value is None:
        return None
    if not isinstance(value, dict) or len(value) > _MAX_BIASES:
        raise ValueError(f"must be an object of at most {_MAX_BIASES} token ids")
    for token, bias in value.items():
        if not _TOKEN_ID.fullmatch(token) or int(token) > MAX_TOKEN_ID:
            raise ValueError("every key must be a token id in quotes")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError("every bias must be a number from -100 to 100")
    return tuple((int(token), float(bias)) for token, bias in value.items())


def _whole(value: object) -> object:
    """Take 4.0 for 4: JSON has one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _seed(value: object) -> object:
    """Take -1 for no seed, as vLLM and llama.cpp do."""
    return None if value == -1 else _whole(value)


def _limit(least: int) -> PlainValidator:
    """Return a validator of a limit in tokens: null, `UNLIMITED`, or a number from `least` on."""

    def check(value: object) -> int | None:
        value = _whole(value)
        if value is None or (type(value) is int and (value == UNLIMITED or value >= least)):
            if value is not None and value > MAX_TOKEN_ID:
                raise ValueError(f"must be at most {MAX_TOKEN_ID}")
            return value
        raise ValueError(f"must be a whole number, at least {least}, or {UNLIMITED} for no limit")

    return PlainValidator(check)


def _prompts(value: object) -> tuple[TextPrompt | TokenPrompt, ...]:
    """Distinguish the four forms: string, strings, token ids, lists of token ids."""
    if isinstance(value, str):
        return (TextPrompt(value),)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, token ids or lists of token ids")
    if isinstance(value[0], str | list) and len(value) > MAX_CHOICES:
        raise ValueError(f"at most {MAX_CHOICES} prompts in one request")
    if all(isinstance(item, str) for item in value):
        return tuple(map(TextPrompt, value))
    if all(isinstance(item, list) for item in value):
        return tuple(_token_prompt(item) for item in value)
    return (_token_prompt(value),)


def _token_prompt(ids: list[object]) -> TokenPrompt:
    if not ids:
        raise ValueError("must not be empty")
    token_ids = tuple(item for item in ids if type(item) is int and 0 <= item <= MAX_TOKEN_ID)
    if len(token_ids) != len(ids):
        raise ValueError("must be a string, a list of strings, token ids or lists of token ids")
    return TokenPrompt(token_ids)


Int = Annotated[int, BeforeValidator(_whole)]
TokenId = Annotated[Int, Field(ge=0, le=MAX_TOKEN_ID)]
Limit = Annotated[int | None, _limit(1)]
Truncation = Annotated[int | None, _limit(1)]  # UNLIMITED is as many as fit
Penalty = Annotated[float, Field(ge=-2, le=2)]
# llama.cpp's words and Groq's: where a model's thoughts are shown.
ReasoningFormat = Literal["none", "auto", "deepseek", "raw", "parsed", "hidden"]


class StreamOptions(Schema):
    """What a stream holds beside the text; they mean nothing where there is none."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(Schema):
    """The fields that both endpoints share; see `protocol.SamplingParams` for their meaning."""

    model: str | None = None
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    n_predict: Limit = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    seed: Annotated[
        Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None, BeforeValidator(_seed)
    ] = None
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_stops)] = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True), at_most(256)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Truncation = None
    return_token_ids: bool | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    # Logits are divided by it: outside of this they leave the range of numbers, or say nothing.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...] | None, BeforeValidator(_biases)] = None
    min_tokens: TokenId | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    best_of: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat = None
    structured_outputs: StructuredOutputs = None
    guided_json: GuidedJson = None
    guided_regex: GuidedRegex = None
    guided_choice: GuidedChoice = None
    guided_grammar: GuidedGrammar = None
    json_schema: GuidedJson = None
    regex: GuidedRegex = None

    @model_validator(mode="after")
    def _one_structure(self) -> SamplingFields:
        if len(fields := list(self.structures())) > 1:
            raise PydanticCustomError(fields[1], f"cannot be combined with `{fields[0]}`")
        return self

    @model_validator(mode="after")
    def _enough_room(self) -> SamplingFields:
        limit = self.limit
        if limit is not None and (self.min_tokens or 0) > limit:
            raise PydanticCustomError("min_tokens", "must not be above the limit of tokens")
        return self

    def structures(self) -> dict[str, Structure]:
        """Return what the text must look like, by the field that says so; at most one."""
        return {name: form for name in STRUCTURES if (form := getattr(self, name, None))}

    @model_validator(mode="after")
    def _best_of_all(self) -> SamplingFields:
        if self.best_of not in (None, self.n or 1):
            raise PydanticCustomError("best_of", "is not supported here unless it equals `n`")
        return self

    @property
    def limit(self) -> int | None:
        """The most tokens of a completion; None leaves it to the window. The newest name wins."""
        named = (self.max_completion_tokens, self.max_tokens, self.n_predict)
        limit = next((value for value in named if value is not None), self.usual_limit)
        return None if limit == UNLIMITED else limit

    @property
    def usual_limit(self) -> int | None:
        """The limit of a request that names none."""
        return None


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1), at_most(MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Tool], Field(fail_fast=True), at_most(MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None
    reasoning_format: ReasoningFormat | None = None
    separate_reasoning: bool | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @property
    def shows_thoughts(self) -> bool:
        """Whether the answer has the model's thoughts."""
        return self.include_reasoning is not False and self.reasoning_format != "hidden"

    @property
    def splits_thoughts(self) -> bool:
        """Whether they are no part of the content; what is hidden never is."""
        joined = self.separate_reasoning is False or self.reasoning_format in ("none", "raw")
        return not (joined and self.shows_thoughts)

    @model_validator(mode="after")
    def _logprobs_to_have_alternatives(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "`top_logprobs` needs `logprobs: true`")
        return self

    @model_validator(mode="after")
    def _tools_to_choose_from(self) -> ChatRequest:
        check_tools(self.tools or (), self.tool_choice)
        return self

    @model_validator(mode="after")
    def _one_end(self) -> ChatRequest:
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError(
                "continue_final_message", "cannot be combined with `add_generation_prompt`"
            )
        return self


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[tuple[TextPrompt | TokenPrompt, ...], PlainValidator(_prompts)]
    max_tokens: Annotated[int | None, _limit(0)] = None
    logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            raise PydanticCustomError(
                "prompt", f"at most {MAX_CHOICES} choices in one request: prompts times `n`"
            )
        return self

    @property
    def usual_limit(self) -> int:
        """OpenAI's default is small."""
        return COMPLETION_MAX_TOKENS
