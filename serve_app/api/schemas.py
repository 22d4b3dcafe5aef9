"""What a request may look like: types and ranges, and messages that name the field.

Values are strict (a number in quotes is not a number), null means absent, and no message
ever quotes what the client sent.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serve_app.errors import InvalidRequest, UnsupportedParameter
from serve_app.protocol import TextPrompt, TokenPrompt

MAX_CHOICES = 128  # OpenAI's limit of `n`; here also of prompts times n
MAX_TOKEN_ID = 2**31 - 1
_MAX_STOP_CHARS = 1024


def _refuse(_value: object) -> None:
    raise PydanticCustomError("unsupported_parameter", "is not supported here")


Refused = Annotated[None, BeforeValidator(lambda value: _refuse(value) if value else None)]


def _text(content: object) -> object:
    """Flatten content parts to one text, a line for each part."""
    if not isinstance(content, list):
        return content
    if not content:
        raise ValueError("must not be an empty list")
    return "\n".join(_part(part) for part in content)


def _part(part: object) -> str:  # ValueError only: pydantic lets a TypeError through
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("every part must be an object with a `type`")  # noqa: TRY004
    if part["type"] != "text":
        raise PydanticCustomError("unsupported_parameter", "only parts of type text are supported")
    text = part.get("text")
    if not isinstance(text, str):
        raise ValueError("a text part must have a `text` that is a string")  # noqa: TRY004
    return text


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


class _Schema(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, hide_input_in_errors=True)


class StreamOptions(_Schema):
    """What a stream tells beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Refused = None


class Message(_Schema):
    """One message of a conversation, its content flattened to text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text)] = None
    name: str | None = None
    tool_call_id: str | None = None
    audio: Refused = None
    function_call: Refused = None
    refusal: Refused = None
    tool_calls: Refused = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.content is None:
            raise ValueError("a message must have a `content`")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a message of role tool must have a `tool_call_id`")
        return self


class SamplingFields(_Schema):
    """The fields that both endpoints share; see `protocol.SamplingParams` for their meaning."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Annotated[tuple[str, ...] | None, BeforeValidator(_stops)] = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(max_length=256)] | None
    ) = None
    ignore_eos: bool | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _only_streams_have_options(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "`stream_options` needs `stream: true`")
        return self


class ChatRequest(SamplingFields):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(SamplingFields):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[tuple[TextPrompt | TokenPrompt, ...], PlainValidator(_prompts)]

    @model_validator(mode="after")
    def _not_too_many(self) -> CompletionRequest:
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            raise PydanticCustomError(
                "prompt", f"at most {MAX_CHOICES} choices in one request: prompts times `n`"
            )
        return self


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
    return kind if kind in ("stream_options", "prompt") else None
