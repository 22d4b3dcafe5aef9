"""What a request may look like: types and ranges, and messages that name the field.

Values are strict, null means absent, and no message ever quotes what the client sent.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, Field, PlainValidator, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serve_app.api.messages import Message, Refused, Schema
from serve_app.api.structure import (
    GuidedChoice,
    GuidedGrammar,
    GuidedJson,
    GuidedRegex,
    ResponseFormat,
    StructuredOutputs,
)
from serve_app.api.tools import Tool, ToolChoice, check_tools
from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.protocol import Structure, TextPrompt, TokenPrompt

MAX_CHOICES = 128  # OpenAI's limit of `n`; here also of prompts times n
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
)
_MAX_STOP_CHARS = 1024
_MAX_BIASES = 1024
_TOKEN_ID = re.compile(r"\d{1,10}", re.ASCII)


def _stops(value: object) -> object:
    if value is None:
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(stop, str) for stop in value):
        raise ValueError("must be a string or a list of strings")
    if len(value) > 4 or not all(0 < len(stop) <= _MAX_STOP_CHARS for stop in value):
        raise ValueError(f"at most 4 strings, each of 1 to {_MAX_STOP_CHARS} characters")
    return tuple(value)


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


def _prompts(value: object) -> tuple[TextPrompt | TokenPrompt, ...]:
    """Tell the four forms apart: string, strings, token ids, lists of token ids."""
    if isinstance(value, str):
        return (_text_prompt(value),)
    if not isinstance(value, list) or not value:
        raise ValueError("must be a string, a list of strings, token ids or lists of token ids")
    if all(isinstance(item, str) for item in value):
        return tuple(_text_prompt(item) for item in value)
    if all(isinstance(item, list) for item in value):
        return tuple(_token_prompt(item) for item in value)
    return (_token_prompt(value),)


def _text_prompt(text: str) -> TextPrompt:
    if not text:
        raise ValueError("must not be empty")
    return TextPrompt(text)


def _token_prompt(ids: list[object]) -> TokenPrompt:
    if not ids:
        raise ValueError("must not be empty")
    token_ids = tuple(item for item in ids if type(item) is int and 0 <= item <= MAX_TOKEN_ID)
    if len(token_ids) != len(ids):
        raise ValueError("must be a string, a list of strings, token ids or lists of token ids")
    return TokenPrompt(token_ids)


Penalty = Annotated[float, Field(ge=-2, le=2)]


class StreamOptions(Schema):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Refused = None


class SamplingFields(Schema):
    """The fields that both endpoints share; see `protocol.SamplingParams` for their meaning."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_stops)] = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(max_length=256)] | None
    ) = None
    ignore_eos: bool | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: Annotated[tuple[tuple[int, float], ...] | None, BeforeValidator(_biases)] = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs = None
    guided_json: GuidedJson = None
    guided_regex: GuidedRegex = None
    guided_choice: GuidedChoice = None
    guided_grammar: GuidedGrammar = None

    @model_validator(mode="after")
    def _only_streams_have_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "`stream_options` needs `stream: true`")
        return self

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

    @property
    def limit(self) -> int | None:
        """The most tokens of a completion; None leaves it to the window."""
        return self.max_tokens


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

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

    @property
    def limit(self) -> int | None:
        """The newer name of the limit wins."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[tuple[TextPrompt | TokenPrompt, ...], PlainValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            raise PydanticCustomError(
                "prompt", f"at most {MAX_CHOICES} choices in one request: prompts times `n`"
            )
        if self.best_of not in (None, self.n or 1):
            raise PydanticCustomError("best_of", "is not supported here unless it equals `n`")
        return self

    @property
    def limit(self) -> int:
        """OpenAI's default is small."""
        return COMPLETION_MAX_TOKENS if self.max_tokens is None else self.max_tokens


# Where pydantic's own words would speak of Python.
_WORDS = {
    "missing": "is required",
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
}
SchemaT = TypeVar("SchemaT", bound=SamplingFields)


def validate(schema: type[SchemaT], body: dict[str, Any]) -> SchemaT:
    """Check a request's body against its schema.

    Raises:
        InvalidRequest: the first fault, with the field's path in `param`.
        UnsupportedParameter: a field deeper inside asks for something that is not done here.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = _path(fault["loc"]) or _param_of_whole(fault["type"])
    message = _WORDS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    if param and f"`{param}`" not in message:
        message = f"`{param}`: {message[:1].lower()}{message[1:]}"
    if fault["type"] == "unsupported_parameter":
        raise UnsupportedParameter(message, param=param)
    raise InvalidRequest(message, param=param)


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for step in loc:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")


def _param_of_whole(kind: str) -> str | None:
    """Return the field that a fault of the whole body is about: its type is the field's name."""
    known = ChatRequest.model_fields.keys() | CompletionRequest.model_fields.keys()
    return kind if kind in known else None
