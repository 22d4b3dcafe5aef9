"""Validate a body, and say the first fault in plain words and by the client's own names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from serve_app.errors import InvalidRequest, RequestError, UnsupportedParameter

# Pydantic speaks of Python and of validation; these speak of JSON, filled from its context.
_WORDS = {
    "missing": "is required",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of at most 64 bits",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must hold at least {min_length}",
    "too_long": "must hold at most {max_length}",
    "string_too_short": "must have at least {min_length} characters",
    "string_too_long": "must have at most {max_length} characters",
    "string_pattern_mismatch": "must be like {pattern}",
    "literal_error": "must be {expected}",
}
SchemaT = TypeVar("SchemaT", bound=BaseModel)


def validate(schema: type[SchemaT], body: dict[str, Any]) -> SchemaT:
    """Check a request's body against its schema.

    Raises:
        InvalidRequest: the first fault, with the field's path in `param`.
        UnsupportedParameter: a field deeper inside asks for something that is not done here.
    """
    try:
        return schema.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
    param: str | None = _path(fault["loc"])
    if not param:  # a fault of the body itself, whose type is the name of the field it is about
        param = fault["type"] if fault["type"] in schema.model_fields else None
    message = _words(fault)
    if param and f"`{param}`" not in message:
        message = f"`{param}`: {message[:1].lower()}{message[1:]}"
    if fault["type"] == "unsupported_parameter":
        raise UnsupportedParameter(message, param=param)
    raise InvalidRequest(message, param=param)


def _words(fault: ErrorDetails) -> str:
    words = _WORDS.get(fault["type"])
    if words is None:
        return fault["msg"].removeprefix("Value error, ")
    return words.format(**{name: _plain(fact) for name, fact in fault.get("ctx", {}).items()})


def _plain(fact: object) -> object:
    return int(fact) if isinstance(fact, float) and fact.is_integer() else fact


def _path(loc: tuple[int | str, ...]) -> str:
    path = ""
    for step in loc:
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
    return path.removeprefix(".")


def with_field_renamed(
    error: RequestError, names: Iterable[tuple[re.Pattern[str], str]]
) -> RequestError:
    """Return an error that calls its field what the client called it.

    Args:
        error: with the schema's name of the field.
        names: pairs of a pattern of such a name and what stands in its place; all are tried.
    """
    if error.param is None:
        return error
    param = error.param
    for pattern, name in names:
        param = pattern.sub(name, param)
    message = error.message.replace(f"`{error.param}`", f"`{param}`")
    return type(error)(message, param=param, **error.details)
