"""What the text of an answer must look like: OpenAI's `response_format`, and its extensions.

`response_format` takes text, json_object (with a schema too, as llama.cpp has it) and
json_schema, enforced whether it says `strict` or not: that says what becomes of what cannot be
enforced, a refusal or nothing. A schema's name means nothing here.
vLLM's `structured_outputs` and its older `guided_…` fields, and `json_schema` and `regex` of
llama.cpp and SGLang, also take a regular expression, a choice of strings, or a grammar in
Lark's syntax. The engine compiles what stands in them, and refuses what it cannot enforce.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any

from pydantic import PlainValidator
from pydantic_core import PydanticCustomError, from_json

from serve_app.protocol import Structure

MAX_WAYS = 16_384  # of a choice
JSON_OBJECT = Structure("json_object")

# What a schema says and OpenAI's object around it does not.
_SCHEMA_KEYS = {"properties", "$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
_SCHEMA_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")


def _response_format(value: object) -> Structure | None:
    """Read OpenAI's three types, and how llama.cpp and TGI write a schema or an expression."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ValueError("must be an object with a `type`")  # noqa: TRY004
    match value.get("type"):
        case "text":
            return None
        case "json_object" | "json":
            if isinstance(value.get("json_schema"), dict):
                return _named_schema(value)
            return JSON_OBJECT if not (form := _schema_of(value)) else json_schema(form)
        case "json_schema":
            return _named_schema(value)
        case "regex":
            return _regex(value.get("value"))
    raise ValueError("the `type` must be text, json_object or json_schema")


def _named_schema(value: dict[str, Any]) -> Structure:
    form = value.get("json_schema")
    if form is None and (schema := _schema_of(value)) is not None:
        return json_schema(schema)
    if isinstance(form, str):  # as some proxies pass it on
        form = from_json(form)
    if not isinstance(form, dict):
        raise ValueError("`json_schema` must be an object with a `schema`")  # noqa: TRY004
    schema = _schema_of(form)
    if schema is None and _is_schema(form):  # without the object around it
        schema = form
    if schema is None and not form.get("name"):
        raise ValueError("`json_schema` must have a `schema`")
    if schema is None:
        return JSON_OBJECT
    return replace(json_schema(schema), strict=form.get("strict") is True)


def _schema_of(form: dict[str, Any]) -> object:
    """Return what stands where OpenAI or TGI put a schema; TGI's may be named as OpenAI's."""
    schema = form.get("schema")
    if schema is None:
        schema = form.get("value")
        if isinstance(schema, dict) and "name" in schema and isinstance(schema.get("schema"), dict):
            schema = schema["schema"]
    return schema


def _is_schema(form: dict[str, Any]) -> bool:
    return bool(form.keys() & _SCHEMA_KEYS) or form.get("type") in _SCHEMA_TYPES


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
    if not isinstance(value, list) or not 0 < len(value) <= MAX_WAYS:
        raise ValueError(f"must be a list of 1 to {MAX_WAYS} strings")
    if not all(isinstance(way, str) for way in value):
        raise ValueError(f"must be a list of 1 to {MAX_WAYS} strings")
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
