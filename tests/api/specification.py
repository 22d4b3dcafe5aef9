"""OpenAI's own OpenAPI document: reduced to what is served here, and as validators.

`data/openai.json` is made from the document of github.com/openai/openai-openapi (MIT):

    python -m tests.api.specification openapi.json LICENSE > tests/api/data/openai.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

OPERATIONS = (
    "createChatCompletion",
    "createCompletion",
    "createResponse",
    "listModels",
    "retrieveModel",
)
# What the `data` of an event holds.
EVENTS = {
    "/chat/completions": "CreateChatCompletionStreamResponse",
    "/completions": "CreateCompletionStreamResponse",
    "/responses": "ResponseStreamEvent",
}
DOCUMENT = Path(__file__).parent / "data" / "openai.json"
_KEPT_OF_OPERATION = ("operationId", "parameters", "requestBody", "responses")
_PROSE = frozenset({"deprecated", "description", "example", "examples", "externalDocs", "title"})


def conform(body: Any, name: str) -> None:
    """Fail unless `body` is valid against the schema called `name`."""
    _validator(name).validate(body)


def request_fields(name: str) -> dict[str, Any]:
    """Return the fields of a request's schema, those of its `allOf` parts included."""
    return _fields(document()["components"]["schemas"][name])


@cache
def document() -> dict[str, Any]:
    """Return the reduced document with its gaps closed; not to be changed."""
    loaded: dict[str, Any] = json.loads(DOCUMENT.read_text())
    _close_gaps(loaded)
    return loaded


def _close_gaps(whole: dict[str, Any]) -> None:
    """Say what the document leaves out or gets wrong; in all else it is taken by its word."""
    schemas = whole["components"]["schemas"]
    # The first token of an echoed prompt has no probability: OpenAI answers null there.
    completion = schemas["CreateCompletionResponse"]["properties"]
    lists = completion["choices"]["items"]["properties"]["logprobs"]["anyOf"][0]["properties"]
    for name in ("token_logprobs", "top_logprobs"):
        lists[name]["items"]["nullable"] = True
    # Streams of completions are not described. OpenAI sends the whole answer's shape, with
    # null where the answer has not ended yet.
    schemas["CreateCompletionStreamResponse"] = chunk = deepcopy(
        schemas["CreateCompletionResponse"]
    )
    chunk["properties"]["choices"]["items"]["properties"]["finish_reason"]["nullable"] = True
    chunk["properties"]["usage"] = {"anyOf": [chunk["properties"]["usage"], {"type": "null"}]}
    # An event is described as if it were what its `data` holds: see `EVENTS`.
    for path in EVENTS:
        answers = whole["paths"][path]["post"]["responses"]["200"]["content"]
        answers["text/event-stream"] = {"schema": {"type": "object", "required": ["data"]}}
    # Errors are not described, but for 429; that answer shows what all of them look like.
    envelope = {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}
    for item in whole["paths"].values():
        for operation in item.values():
            operation["responses"]["default"] = {"content": {"application/json": envelope}}


def reduce(whole: dict[str, Any], license_text: str) -> dict[str, Any]:
    """Cut OpenAI's document down to `OPERATIONS` and what they refer to, without its prose."""
    paths: dict[str, Any] = {}
    for path, item in whole["paths"].items():
        for method, operation in item.items():
            if operation.get("operationId") in OPERATIONS:
                kept = {key: operation[key] for key in _KEPT_OF_OPERATION if key in operation}
                paths.setdefault(path, {})[method] = _without_prose(kept)
    components: dict[str, Any] = {}
    for kind, name in sorted(_component_names(paths, whole)):
        part = _without_prose(whole["components"][kind][name])
        components.setdefault(kind, {})[name] = part
    version = whole["info"]["version"]
    return {
        "openapi": whole["openapi"],
        "info": {"title": "OpenAI API, reduced", "version": version},
        "x-origin": f"github.com/openai/openai-openapi, document {version}, prose left out",
        "x-license": license_text.strip().splitlines(),
        "paths": paths,
        "components": components,
    }


@cache
def _validator(name: str) -> Draft202012Validator:
    reference = {"$ref": f"#/components/schemas/{name}"}
    found = document()["components"]["schemas"]
    needed = [key for kind, key in _component_names(reference, document()) if kind == "schemas"]
    schemas = {key: _draft(found[key]) for key in needed}
    return Draft202012Validator({**reference, "components": {"schemas": schemas}})


def _fields(schema: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in schema:
        schema = _resolve(schema["$ref"], document())
    found: dict[str, Any] = {}
    for part in schema.get("allOf", ()):
        found |= _fields(part)
    return found | schema.get("properties", {})


def _component_names(part: Any, whole: dict[str, Any]) -> set[tuple[str, str]]:
    """Return kind and name of every component that is referred to, also indirectly."""
    names: set[tuple[str, str]] = set()
    waiting = set(_references(part))
    while waiting:
        reference = waiting.pop()
        _, _, kind, name = reference.split("/")
        if (kind, name) not in names:
            names.add((kind, name))
            waiting |= set(_references(_without_prose(_resolve(reference, whole))))
    return names


def _references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for value in part.values():
            yield from _references(value)
    elif isinstance(part, list):
        for item in part:
            yield from _references(item)


def _resolve(reference: str, whole: dict[str, Any]) -> Any:
    _, _, kind, name = reference.split("/")
    return whole["components"][kind][name]


def _without_prose(part: Any, *, names: bool = False) -> Any:
    """Leave out what only people read; under `properties` keys are fields and all stay."""
    if isinstance(part, list):
        return [_without_prose(item) for item in part]
    if not isinstance(part, dict):
        return part
    return {
        key: _without_prose(value, names=key == "properties" and not names)
        for key, value in part.items()
        if names or not (key in _PROSE or key.startswith("x-"))
    }


def _draft(schema: Any) -> Any:
    """Turn OpenAPI 3.0's `nullable` into JSON Schema."""
    if isinstance(schema, list):
        return [_draft(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _draft(value) for key, value in schema.items()}
    if result.pop("nullable", False):
        return {"anyOf": [result, {"type": "null"}]}
    return result


def _main(source: str, license_file: str) -> None:
    reduced = reduce(json.loads(Path(source).read_text()), Path(license_file).read_text())
    schemas = reduced["components"].pop("schemas")
    head = json.dumps(reduced, indent=1)
    lines = ",\n".join(f"   {json.dumps(name)}: {json.dumps(schemas[name])}" for name in schemas)
    # one schema a line: a new version of the document shows as the schemas that changed
    print(head.removesuffix("\n }\n}") + f',\n  "schemas": {{\n{lines}\n  }}\n }}\n}}')  # noqa: T201


if __name__ == "__main__":
    _main(*sys.argv[1:])
