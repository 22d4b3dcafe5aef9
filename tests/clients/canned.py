"""A model that does what it is asked, without weights: it answers what a client must understand.

It fills in whatever schema it is held to, calls the first tool it is shown, and says what a tool
found; all through the real `FakeEngine`, so that a client meets the real application.
"""

from __future__ import annotations

import json
from typing import Any

from serve_app.protocol import ChatPrompt, GenerationRequest
from tests.fakes import FakeEngine, Pause

FILLED = {"string": "Bern", "integer": 7, "number": 7.5, "boolean": True, "null": None}


def filled(schema: Any, root: Any) -> Any:
    """Return the simplest value that follows a schema."""
    schema = resolved(schema, root)
    for key in ("const", "default"):
        if schema.get(key) is not None:
            return schema[key]
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type", "object" if "properties" in schema else "string")
    if kind == "object":
        return {name: filled(part, root) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        return [filled(schema.get("items", {}), root)]
    return FILLED[kind[0] if isinstance(kind, list) else kind]


def resolved(schema: Any, root: Any) -> Any:
    """Return the schema that a reference, or the first of several alternatives, leads to."""
    if "$ref" in schema:
        target = root
        for step in schema["$ref"].removeprefix("#/").split("/"):
            target = target[step]
        return resolved(target, root)
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            return resolved(schema[key][0], root)
    return schema


def answer(request: GenerationRequest) -> str:
    """Return the text of the model."""
    structure, prompt = request.sampling.structure, request.prompt
    if structure is not None:
        if structure.kind == "json_object":
            return json.dumps({"city": "Bern", "count": 7})
        schema = json.loads(structure.definition)
        return json.dumps(filled(schema, schema))
    if not isinstance(prompt, ChatPrompt):
        return " Bern."
    last = prompt.messages[-1]
    if last["role"] == "tool":
        return f"The tool says {last['content']}."
    if prompt.tools:
        function = prompt.tools[0]["function"]
        arguments = filled(function["parameters"], function["parameters"])
        return json.dumps({"name": function["name"], "parameters": arguments})
    return "Hello from Bern."


def script(request: GenerationRequest) -> list[str | Pause]:
    """Return the answer in pieces of a few characters, as a model would write it."""
    text = answer(request)
    steps: list[str | Pause] = []
    for start in range(0, len(text), 7):
        steps += [text[start : start + 7], Pause(0.001)]
    return steps[:-1]


def engine() -> FakeEngine:
    """Return the engine."""
    return FakeEngine(script)
