"""OpenAI's official schemas, as validators."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

_DOCUMENT = json.loads((Path(__file__).parent / "data" / "openai.json").read_text())
REQUEST_FIELDS: dict[str, list[str]] = _DOCUMENT["request_fields"]
# In streams OpenAI itself sends null here, against the letter of its own document.
NULL_IN_CHUNKS = ("finish_reason", "usage")


def conform(body: Any, name: str, *, chunk: bool = False) -> None:
    """Fail unless `body` is valid against the schema called `name`.

    Args:
        body: a parsed answer.
        name: of the component schema.
        chunk: `CreateCompletionResponse` as a part of a stream, where some fields are null.
    """
    schemas = {key: _draft(value, chunk=chunk) for key, value in _DOCUMENT["schemas"].items()}
    schema = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}}
    Draft202012Validator(schema).validate(body)


def _draft(schema: Any, *, chunk: bool) -> Any:
    """Turn OpenAPI 3.0's `nullable` into JSON Schema."""
    if isinstance(schema, list):
        return [_draft(item, chunk=chunk) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _draft(value, chunk=chunk) for key, value in schema.items()}
    if chunk:
        for name in set(NULL_IN_CHUNKS) & set(schema.get("properties", {})):
            result["properties"][name] = {"anyOf": [result["properties"][name], {"type": "null"}]}
    if result.pop("nullable", False):
        return {"anyOf": [result, {"type": "null"}]}
    return result
