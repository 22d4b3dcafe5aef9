"""A conversation's messages: what a client may send, and what the chat template is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, from_json

MAX_CALLS = 1024  # of one message


def _refuse(_value: object) -> None:
    raise PydanticCustomError("unsupported_parameter", "is not supported here")


Refused = Annotated[None, BeforeValidator(lambda value: _refuse(value) if value else None)]


class Schema(BaseModel):
    """Strict (a number in quotes is not a number), frozen, and silent about what was sent."""

    model_config = ConfigDict(strict=True, frozen=True, hide_input_in_errors=True)


def at_most(length: int) -> BeforeValidator:
    """Return a validator that refuses a longer list before it looks at what is in it."""

    def check(value: object) -> object:
        if isinstance(value, list) and len(value) > length:
            raise ValueError(f"must hold at most {length}")
        return value

    return BeforeValidator(check)


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


def only_functions(kind: object) -> object:
    """Refuse what is neither a function nor nonsense: custom tools are not done here."""
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError("unsupported_parameter", "only `function` is supported here")
    return kind


FunctionKind = Annotated[Literal["function"], BeforeValidator(only_functions)]


class FunctionCall(Schema):
    """Which function an earlier answer called, and with what."""

    name: str
    arguments: str


class ToolCall(Schema):
    """One call of an earlier answer."""

    id: str
    type: FunctionKind = "function"
    function: FunctionCall

    def shown(self) -> dict[str, Any]:
        """Return the call as chat templates read it: arguments are an object if they can be."""
        function = {"name": self.function.name, "arguments": _object(self.function.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


def _object(text: str) -> object:
    try:
        value = from_json(text or "{}")
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


class Message(Schema):
    """One message of a conversation, its content flattened to text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text)] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True), at_most(MAX_CALLS)] | None = None
    audio: Refused = None
    function_call: Refused = None
    refusal: Refused = None

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of role assistant can have `tool_calls`")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message must have a `content`")
        if self.role == "tool" and not self.tool_call_id:
            raise ValueError("a message of role tool must have a `tool_call_id`")
        return self

    def shown(self) -> dict[str, Any]:
        """Return the message for the template; `developer` is today's name of `system`."""
        role = "system" if self.role == "developer" else self.role
        fields: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.name is not None:
            fields["name"] = self.name
        if self.tool_call_id is not None:
            fields["tool_call_id"] = self.tool_call_id
        if self.tool_calls:
            fields["tool_calls"] = [call.shown() for call in self.tool_calls]
        return fields


def shown(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """Return a conversation for the template; a tool's answer names the function it is of."""
    names: dict[str, str] = {}
    result = []
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls or ()}
        fields = message.shown()
        if message.role == "tool" and message.tool_call_id in names:
            fields.setdefault("name", names[message.tool_call_id])
        result.append(fields)
    return tuple(result)
