"""The functions that a model may call: what a client may ask for, and how a call is enforced.

`auto` leaves the choice to the model, which writes its calls in the form of its own training.
`required` and a named function are enforced token by token, in the form of `calls_schema`;
then the arguments follow the function's schema, as `strict` asks for. Under `auto` nothing is
enforced, so `strict` is the model's good will there.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_letters, digits
from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticCustomError

from serve_app.api.messages import FunctionKind, Schema, only_functions
from serve_app.protocol import SUBSCHEMA

_ID_CHARS = ascii_letters + digits
_ANY_OBJECT: dict[str, Any] = {"type": "object"}


class Function(Schema):
    """A function's name, what it is for, and the JSON schema of its arguments."""

    # OpenAI takes neither dots, slashes and colons nor more than 64; other servers do, and the
    # names of tools that come over MCP have them.
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,256}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Schema):
    """One entry of `tools`."""

    type: FunctionKind
    function: Function

    def shown(self) -> dict[str, Any]:
        """Return the definition for the chat template, with all that some templates rely on."""
        function: dict[str, Any] = {
            "name": self.function.name,
            "description": self.function.description or "",
            "parameters": {**(self.function.parameters or _ANY_OBJECT)},
        }
        function["parameters"].setdefault("properties", {})
        return {"type": self.type, "function": function}


@dataclass(frozen=True, slots=True)
class NamedFunction:
    """A `tool_choice` that leaves none: the function that has to be called."""

    name: str


def _choice(value: object) -> str | NamedFunction | None:
    if value is None or value in ("none", "auto", "required"):
        return value
    if not isinstance(value, dict):
        raise ValueError("must be none, auto, required or an object that names a function")  # noqa: TRY004
    only_functions(value.get("type"))
    function = value.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if value.get("type") != "function" or not isinstance(name, str):
        raise ValueError("must have the `type` function and a `function` with a `name`")
    return NamedFunction(name)


ToolChoice = Annotated[str | NamedFunction | None, PlainValidator(_choice)]


def check_tools(tools: Sequence[Tool], choice: str | NamedFunction | None) -> None:
    """Refuse tools of one name, and a choice that no tool can satisfy.

    Raises:
        PydanticCustomError: its type is the name of the field at fault.
    """
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise PydanticCustomError("tools", "two functions have the same name")
    if isinstance(choice, NamedFunction) and choice.name not in names:
        raise PydanticCustomError("tool_choice", "names a function that is not among `tools`")
    if choice == "required" and not tools:
        raise PydanticCustomError("tool_choice", "requires a call, but there are no `tools`")


def new_call_id() -> str:
    """Return an id for a call: nine letters and digits, as Mistral's chat templates want them."""
    return "".join(secrets.choice(_ID_CHARS) for _ in range(9))


def calls_schema(
    tools: Sequence[Tool], *, parallel: bool, answer: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the JSON schema of calls, one in an object or several in a list.

    Args:
        tools: at least one of them is called.
        parallel: allow a list of calls.
        answer: another schema that the text may follow instead.
    """
    definitions = {}
    for index, tool in enumerate(tools):
        name = f"tools[{index}].function.parameters"
        parameters = tool.function.parameters or _ANY_OBJECT
        definitions[tool.function.name] = _part(
            parameters, strict=bool(tool.function.strict), name=name
        )
    calls: dict[str, Any] = {"anyOf": [_call_schema(name) for name in definitions]}
    forms = [{"type": "array", "items": calls, "minItems": 1} if parallel else calls]
    if answer is not None:
        place = "the.answer"  # no function's name holds a dot
        definitions[place] = _part(answer, strict=False, name="response_format")
        forms.append({"$ref": f"#/$defs/{place}"})
    return {"$defs": definitions, "anyOf": forms}


def _part(schema: dict[str, Any], *, strict: bool, name: str) -> dict[str, Any]:
    """Return a schema as a part of another one: the root of its own references."""
    return {
        **schema,
        # Its own may be that of another tool, too.
        "$id": f"https://part.invalid/{name}",
        SUBSCHEMA: {"strict": strict, "name": name, "id": schema.get("$id")},
    }


def _call_schema(name: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
