"""A structure to llguidance's own form; runs in a worker, where its cost hurts nobody."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from llguidance import LLMatcher

from serve_app.engine.grammar.limits import MAX_CHOICES, check_text
from serve_app.engine.grammar.schema import prepare
from serve_app.protocol import SUBSCHEMA

# JSON as models have learnt to write it, and without free spaces: a model that likes them could
# go on with them for ever. Compact separators cost a small model a third of its right answers.
OPTIONS: Any = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    # `prepare` has refused what may not be left out.
    "lenient": True,
    "coerce_one_of": True,
}

# Remarks of llguidance on what changes no document's validity, or next to nothing.
HARMLESS = ("Unknown format", "oneOf not fully supported")


def translate(kind: str, definition: str, *, strict: bool) -> str:
    """Return a structure in llguidance's form, not compiled yet.

    Args:
        kind: of `protocol.Structure`.
        definition: the schema, expression, choices or grammar.
        strict: whether what cannot be enforced of a schema is an error.

    Raises:
        ValueError: malformed, over a limit, or not to be enforced; says which.
    """
    check_text(kind, definition)
    match kind:
        case "json_object":
            return _of_schema({"type": "object"}, strict=False)
        case "json_schema":
            return _of_schema(json.loads(definition), strict=strict)
        case "regex":
            return str(LLMatcher.grammar_from_regex(definition))
        case "choice":
            return _of_choices(json.loads(definition))
        case "grammar":
            return str(LLMatcher.grammar_from_lark(definition))
    raise ValueError(f"{kind} is no kind of structure")


def _of_schema(schema: Any, *, strict: bool) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("the schema must be an object")  # noqa: TRY004 - a client's mistake
    prepared = prepare(schema, strict=strict, is_regular=_is_regular)
    grammar = str(LLMatcher.grammar_from_json_schema(prepared, OPTIONS))
    is_error, remarks = LLMatcher.validate_grammar_with_warnings(grammar)
    if is_error:
        return _without_bad_parts(schema, prepared) or grammar  # the compiler says what is wrong
    if strict and (left := [remark for remark in remarks if not remark.startswith(HARMLESS)]):
        raise ValueError(left[0])
    return grammar


def _without_bad_parts(schema: dict[str, Any], prepared: dict[str, Any]) -> str | None:
    """Let parts of their own (tools) that cannot be compiled be any object.

    Raises:
        ValueError: one of them is strict; names it.
    """
    definitions = prepared.get("$defs", {})
    parts = {name: part[SUBSCHEMA] for name, part in schema.get("$defs", {}).items()
             if isinstance(part, dict) and isinstance(part.get(SUBSCHEMA), dict)}  # fmt: skip
    changed = dict(definitions)
    for name, mark in parts.items():
        alone = {"$defs": definitions, "$ref": f"#/$defs/{name}"}
        fault = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(alone, OPTIONS))
        if fault and mark.get("strict"):
            raise ValueError(f"`{mark.get('name', name)}`: {fault}")
        if fault:
            changed[name] = {"type": "object"}
    if changed == definitions:
        return None
    return str(LLMatcher.grammar_from_json_schema({**prepared, "$defs": changed}, OPTIONS))


def _of_choices(choices: list[str]) -> str:
    if not choices:
        raise ValueError("there is nothing to choose from")
    if len(choices) > MAX_CHOICES:
        raise ValueError(f"there are {len(choices):,} choices, {MAX_CHOICES:,} is the limit")
    # As one terminal thousands are no more than one: a rule would follow each by itself.
    texts = " | ".join(map(json.dumps, choices))
    return str(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}"))


@cache
def _is_regular(pattern: str) -> bool:
    """Return whether a pattern can be enforced; look-around and back references cannot."""
    grammar = LLMatcher.grammar_from_json_schema({"type": "string", "pattern": pattern}, OPTIONS)
    return not LLMatcher.validate_grammar(grammar)
