"""What the text of an answer must look like: OpenAI's `response_format`, and its extensions.

`response_format` takes text, json_object and json_schema (enforced whether it says `strict`
or not). vLLM's `structured_outputs` and its older `guided_…` fields also take a regular
expression, a choice of strings, or a grammar in Lark's syntax. The engine compiles what
stands in them, and refuses what it cannot enforce.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError, from_json

from serve_app.protocol import Structure

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
JSON_OBJECT = Structure("json_object")


def _response_format(value: object) -> Structure | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object with a `type`")  # noqa: TRY004
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return JSON_OBJECT
        case "json_schema":
            return _named_schema(value.get("json_schema"))
    raise ValueError("the `type` must be text, json_object or json_schema")


def _named_schema(form: object) -> Structure:
    if not isinstance(form, dict):
        raise ValueError("`json_schema` must be an object with a `name` and a `schema`")  # noqa: TRY004
    if not isinstance(form.get("name"), str) or not _NAME.fullmatch(form["name"]):
        raise ValueError("the schema's `name` must be 1 to 64 of a-z, A-Z, 0-9, _ and -")
    schema = form.get("schema")
    return JSON_OBJECT if schema is None else json_schema(schema)


def json_schema(schema: object) -> Structure:
    """Return the structure of a JSON schema, an object or its text.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(schema, str):
        schema = from_json(schema)
    if not isinstance(schema, dict):
        raise ValueError("the schema must be an object")  # noqa: TRY004
    return Structure("json_schema", json.dumps(schema))


def _regex(value: object) -> Structure:
    return Structure("regex", _filled(value))


def _grammar(value: object) -> Structure:
    return Structure("grammar", _filled(value))


def _filled(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("must be a string of at least one character")
    return value


def _choice(value: object) -> Structure:
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise ValueError("must be a list of at least one string")
    return Structure("choice", json.dumps(value))


_FORMS: dict[str, Callable[[object], Structure]] = {
    "json": json_schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": lambda _value: JSON_OBJECT,
}


def _structured_outputs(value: object) -> Structure | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object")  # noqa: TRY004
    asked = {name: form for name, form in value.items() if form not in (None, False)}
    if asked.keys() - _FORMS.keys():
        raise PydanticCustomError("unsupported_parameter", f"takes only {', '.join(_FORMS)}")
    if len(asked) != 1:
        raise ValueError(f"must hold exactly one of {', '.join(_FORMS)}")
    (name,) = asked
    return _FORMS[name](asked[name])


def _guided(form: str) -> PlainValidator:
    return PlainValidator(lambda value: None if value is None else _FORMS[form](value))


ResponseFormat = Annotated[Structure | None, PlainValidator(_response_format)]
StructuredOutputs = Annotated[Structure | None, PlainValidator(_structured_outputs)]
GuidedJson = Annotated[Structure | None, _guided("json")]
GuidedRegex = Annotated[Structure | None, _guided("regex")]
GuidedChoice = Annotated[Structure | None, _guided("choice")]
GuidedGrammar = Annotated[Structure | None, _guided("grammar")]
