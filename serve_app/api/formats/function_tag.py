"""Calls in tags: `<function=f>{…}</function>`, or with a tag for each argument, as Qwen3-Coder.

    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>

Some models write the names as attributes: `<function name="f">`, `<parameter name="city">`.
What stands in a parameter's tag is a text; the tool's schema says whether it means a number, a
list, or the text itself.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from serve_app.api.formats.buffer import (
    SPACE,
    Buffer,
    CallArguments,
    CallBegun,
    Read,
    Tools,
    Wait,
)

OPEN, CLOSE = "<function", "</function>"
PARAMETER, CLOSE_PARAMETER = "<parameter", "</parameter>"


class FunctionTag:
    """One such call."""

    opening = OPEN

    def read(self, buffer: Buffer, at: int, tools: Tools, *, sure: bool) -> Read[bool]:  # noqa: ARG002
        """See `table.Form`."""
        if not (yield from buffer.starts(self.opening, at)):
            return False
        name, at = yield from _named(buffer, at + len(OPEN), tools)
        if not name:
            return False
        at = yield from buffer.skip(at)
        if (yield from buffer.char(at)) == "{":
            buffer.take(at)
            yield CallBegun(name)
            yield from buffer.emit_object()
        elif (yield from _begins_parameters(buffer, at)):
            buffer.take(at)
            yield CallBegun(name)
            yield from _parameters(buffer, tools.properties(name))
        else:
            return False
        yield from take_tag(buffer, CLOSE)
        return True


def _named(buffer: Buffer, at: int, tools: Tools) -> Wait[tuple[str, int]]:
    """Return the tool that a tag names, and the place behind the tag; "" for none."""
    mark = "=" if (yield from buffer.char(at)) == "=" else " name="
    if not (yield from buffer.starts(mark, at)):
        return "", at
    at += len(mark)
    quote = yield from buffer.char(at)
    quote = quote if quote in ('"', "'") else ""
    at += len(quote)
    name = yield from buffer.one_of(tools.names, at)
    end = f"{quote}>"
    closes = yield from buffer.starts(end, at + len(name))
    return (name, at + len(name) + len(end)) if closes else ("", at)


def _key(tag: str) -> str:
    """Return the name in what stands behind `<parameter`: `=city`, ` name="city"`."""
    text = tag.strip()
    text = text if text.startswith("=") else text.removeprefix("name").lstrip()
    return text.removeprefix("=").strip("\"' ")


def take_tag(buffer: Buffer, tag: str, *, strays: str = "") -> Wait[None]:
    """Take a closing tag and white space before it, or what the end of the text left of it.

    Args:
        buffer: the text.
        tag: to take.
        strays: characters that may stand before it as well.
    """
    at = yield from buffer.skip(0, SPACE + strays)
    if (yield from buffer.starts(tag, at)):
        buffer.take(at + len(tag))
    elif buffer.ended and tag.startswith(buffer.text[at:]):
        buffer.take(len(buffer.text))


def _begins_parameters(buffer: Buffer, at: int) -> Wait[bool]:
    return (yield from buffer.starts(PARAMETER, at)) or (yield from buffer.starts(CLOSE, at))


def _parameters(buffer: Buffer, properties: Mapping[str, Any]) -> Read[None]:
    lead = "{"
    while True:
        at = yield from buffer.skip(0)
        if not (yield from buffer.starts(PARAMETER, at)):
            break
        at += len(PARAMETER)
        end = yield from _find(buffer, (">",), at)
        stop = yield from _find(buffer, (CLOSE_PARAMETER, PARAMETER, CLOSE), end + 1)
        if stop == len(buffer.text):
            buffer.take(stop)  # cut off: half a value is none
            return
        key, text = _key(buffer.text[at:end]), buffer.text[end + 1 : stop]
        buffer.take(stop)
        yield from take_tag(buffer, CLOSE_PARAMETER)
        value = _value(text.removeprefix("\n").removesuffix("\n"), properties.get(key))
        yield CallArguments(f"{lead}{json.dumps(key)}: {value}")
        lead = ", "
    if buffer.text or lead == "{":
        yield CallArguments("{}" if lead == "{" else "}")


def _find(buffer: Buffer, marks: tuple[str, ...], at: int) -> Wait[int]:
    """Return the place of the first mark from `at` on; the text's end if there is none."""
    searched = at
    while True:
        found = [place for mark in marks if (place := buffer.text.find(mark, searched)) >= 0]
        if found:
            return min(found)
        searched = max(at, len(buffer.text) - max(map(len, marks)))
        if not (yield from buffer.more(len(buffer.text))):
            return len(buffer.text)


def _value(text: str, schema: object) -> str:
    """Return a parameter's text as the JSON value that its schema asks for."""
    kinds = _kinds(schema)
    if not kinds or ("string" in kinds and not ("null" in kinds and text.strip() == "null")):
        return json.dumps(text, ensure_ascii=False)
    for read in (json.loads, ast.literal_eval):  # models of Python write True and None
        try:
            return json.dumps(read(text.strip()), ensure_ascii=False)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return json.dumps(_WORDS.get(text.strip().lower(), text), ensure_ascii=False)


_WORDS = {"true": True, "false": False, "null": None, "none": None}


def _kinds(schema: object) -> set[str]:
    """Return the types that a schema names; none if it leaves them open."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    kinds = {kind} if isinstance(kind, str) else set(kind) if isinstance(kind, list) else set()
    for choice in ("anyOf", "oneOf"):
        for each in schema.get(choice) or ():
            kinds |= _kinds(each)
    return {kind for kind in kinds if isinstance(kind, str)}
