"""A conversation's messages: what a client may send, and what the chat template is shown.

What the system and the user say is read strictly. What a client repeats of earlier answers and
results comes through many frameworks, which write the same thing in many ways; it is read as
what it means: no content is an empty one, arguments may be an object, results without an id
answer the calls in their order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    model_validator,
)
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


REPEATED = ("assistant", "tool")  # roles of what a client repeats
_TEXTS = ("text", "input_text", "output_text")
_THOUGHTS = ("thinking", "redacted_thinking", "reasoning")  # of other servers' answers


def _text(content: object, info: ValidationInfo) -> object:
    """Flatten a content to one text, a line for each part; None if there is none."""
    role = info.data.get("role")
    if role == "tool" and not isinstance(content, str | list | None):
        return json.dumps(content, ensure_ascii=False)  # a function's value as it is
    if not isinstance(content, list):
        return content
    if role not in REPEATED and not content:
        raise ValueError("must not be an empty list")
    if role == "tool" and not all(map(_is_part, content)):
        return json.dumps(content, ensure_ascii=False)
    texts = [_part(part, role) for part in content]
    return "\n".join(text for text in texts if text is not None)


def _is_part(part: object) -> bool:
    return isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("type"), str))


def _part(part: object, role: object) -> str | None:  # pydantic lets a TypeError through
    if isinstance(part, str) and role in REPEATED:
        return part
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ValueError("every part must be an object with a `type`")  # noqa: TRY004
    kind = part["type"]
    if kind in _THOUGHTS and role == "assistant":
        return None
    field = "refusal" if kind == "refusal" and role == "assistant" else "text"
    if kind not in (*_TEXTS, field):
        raise PydanticCustomError("unsupported_parameter", "only parts of type text are supported")
    if not isinstance(part.get(field), str):
        raise ValueError(f"a {kind} part must have a `{field}` that is a string")  # noqa: TRY004
    return str(part[field])


def only_functions(kind: object) -> object:
    """Refuse what is neither a function nor nonsense: custom tools are not done here."""
    if isinstance(kind, str) and kind != "function":
        raise PydanticCustomError("unsupported_parameter", "only `function` is supported here")
    return kind


FunctionKind = Annotated[Literal["function"], BeforeValidator(only_functions)]


def _arguments(value: object) -> str | dict[str, Any] | None:
    if value is None or isinstance(value, str | dict):
        return value
    if value == []:  # PHP's way to write an object without keys
        return {}
    raise ValueError("must be an object, or its text")


class FunctionCall(Schema):
    """Which function an earlier answer called, and with what."""

    name: str
    arguments: Annotated[str | dict[str, Any] | None, PlainValidator(_arguments)] = None

    def shown(self) -> dict[str, Any]:
        """Return the call as chat templates read it: arguments are an object if they can be."""
        return {"name": self.name, "arguments": _object(self.arguments)}


class ToolCall(Schema):
    """One call of an earlier answer."""

    id: str | None = None
    type: FunctionKind | None = None
    function: FunctionCall


def _object(arguments: str | dict[str, Any] | None) -> object:
    if arguments is None or isinstance(arguments, dict):
        return arguments or {}
    try:
        value = from_json(arguments or "{}")
    except ValueError:
        return arguments
    if value is None:
        return {}
    return value if isinstance(value, dict) else arguments


def _if_text(value: object) -> object:
    return value if isinstance(value, str) else None


class Message(Schema):
    """One message of a conversation, its content flattened to text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text)] = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True), at_most(MAX_CALLS)] | None = None
    audio: Refused = None
    function_call: Refused = None
    refusal: str | None = None
    reasoning_content: Annotated[str | None, BeforeValidator(_if_text)] = None
    reasoning: Annotated[str | None, BeforeValidator(_if_text)] = None  # the same, elsewhere

    @model_validator(mode="after")
    def _complete(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of role assistant can have `tool_calls`")
        if self.content is None and self.role not in REPEATED:
            raise ValueError("a message must have a `content`")
        return self

    def shown(self) -> dict[str, Any]:
        """Return the message for the template; `developer` is today's name of `system`."""
        role = "system" if self.role == "developer" else self.role
        fields: dict[str, Any] = {"role": role, "content": self.content or self.refusal or ""}
        if self.name is not None:
            fields["name"] = self.name
        if self.tool_call_id:
            fields["tool_call_id"] = self.tool_call_id
        if role == "assistant" and (thoughts := self.reasoning_content or self.reasoning):
            fields["reasoning_content"] = thoughts
        if self.tool_calls:
            fields["tool_calls"] = [
                {"id": call.id, "type": "function", "function": call.function.shown()}
                for call in self.tool_calls
            ]
        return fields


def shown(messages: Sequence[Message]) -> tuple[dict[str, Any], ...]:
    """Return a conversation for the template.

    Every call has an id and every result that of its call, with the function's name: some
    templates print them, and not every client sends them.
    """
    pairing = _Pairing({call.id for m in messages for call in m.tool_calls or () if call.id})
    result = [message.shown() for message in messages]
    for fields in result:
        for call in fields.get("tool_calls", ()):
            pairing.call(call)
        if fields["role"] == "tool":
            pairing.answer(fields)
    return tuple(result)


class _Pairing:
    """Pairs calls and results of one conversation, in order.

    Args:
        taken: ids that the client gave.
    """

    def __init__(self, taken: set[str]) -> None:
        self._new = (id_ for n in count(1) if (id_ := f"call{n:05d}") not in taken)
        self._names: dict[str, str] = {}
        self._open: list[str] = []  # calls without a result

    def call(self, call: dict[str, Any]) -> None:
        """Give a call an id if it has none."""
        call["id"] = call["id"] or next(self._new)
        self._names[call["id"]] = call["function"]["name"]
        self._open.append(call["id"])

    def answer(self, message: dict[str, Any]) -> None:
        """Give a result the id of its call, and the function's name."""
        id_ = message.get("tool_call_id") or self._first_open(message.get("name"))
        message["tool_call_id"] = id_
        if id_ in self._open:
            self._open.remove(id_)
        if id_ in self._names:
            message.setdefault("name", self._names[id_])

    def _first_open(self, name: str | None) -> str:
        of_name = (id_ for id_ in self._open if name in (None, self._names[id_]))
        return next(of_name, None) or next(iter(self._open), None) or next(self._new)
