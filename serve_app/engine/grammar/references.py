"""Where the parts of a JSON schema are, and what references call them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urldefrag, urljoin

from serve_app.engine.grammar.limits import MAX_DEPTH
from serve_app.protocol import SUBSCHEMA

# Keywords whose value is a schema, a list of schemas, or an object of schemas.
ONE = frozenset({
    "additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains",
    "propertyNames", "unevaluatedProperties", "unevaluatedItems",
})  # fmt: skip
MANY = frozenset({"allOf", "anyOf", "oneOf", "prefixItems", "items"})
NAMED = frozenset({
    "properties", "patternProperties", "$defs", "definitions", "dependentSchemas",
})  # fmt: skip


class SchemaFault(ValueError):
    """The schema cannot be enforced; the message names the place."""


def identifiers(node: Any, base: str, pointer: str, depth: int) -> Iterator[tuple[str, str]]:
    """Yield every URI that a reference may name, with the pointer to its schema."""
    if depth > MAX_DEPTH:
        raise SchemaFault(f"it is nested deeper than {MAX_DEPTH} levels")
    if not isinstance(node, dict):
        return
    if (own := base_of(node, base)) != base or pointer == "#":
        base = own
        yield base, pointer
    if isinstance(mark := node.get(SUBSCHEMA), dict) and isinstance(mark.get("id"), str):
        yield urldefrag(mark["id"]).url, pointer
    for keyword in ("$anchor", "$dynamicAnchor"):
        if isinstance(anchor := node.get(keyword), str):
            yield f"{base}#{anchor}", pointer
    for step, child in children(node):
        yield from identifiers(child, base, f"{pointer}/{step}", depth + 1)


def base_of(node: dict[str, Any], base: str) -> str:
    """Return the URI that references inside a schema are resolved against."""
    identifier = node.get("$id", node.get("id"))
    if isinstance(identifier, str) and not identifier.startswith("#"):
        base = urldefrag(urljoin(base, identifier)).url
    return base


def children(node: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the schemas right below one, with their step of a JSON pointer."""
    for keyword, value in node.items():
        if keyword in NAMED and isinstance(value, dict):
            for name, child in value.items():
                yield f"{keyword}/{escaped(name)}", child
        elif keyword in MANY and isinstance(value, list):
            for index, child in enumerate(value):
                yield f"{keyword}/{index}", child
        elif keyword in ONE:
            yield keyword, value


def escaped(name: str) -> str:
    """Return a key as a step of a JSON pointer."""
    return name.replace("~", "~0").replace("/", "~1")


def quoted(pointer: str) -> str:
    """Return a pointer as a reference has it."""
    return "#" + quote(pointer[1:], safe="/~$!&'()*+,;=:@-._")
