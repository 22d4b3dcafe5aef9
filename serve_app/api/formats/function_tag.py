"""Calls in tags: `<function=f>{…}</function>`, or with a tag for each argument, as Qwen3-Coder.

    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>

What stands in a parameter's tag is a text; the tool's schema says whether it means a number, a
list, or the text itself.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from typing import Any

from serve_app.api.formats.tape import CallArguments, CallBegun, Read, Tape, Tools, Wait

CLOSE, PARAMETER, CLOSE_PARAMETER = "</function>", "<parameter=", "</parameter>"


class FunctionTag:
    """One such call."""

    opening = "<function="

    def read(self, tape: Tape, at: int, tools: Tools, *, sure: bool) -> Read[bool]:  # noqa: ARG002
        """See `table.Form`."""
        if not (yield from tape.starts(self.opening, at)):
            return False
        at += len(self.opening)
        name = yield from tape.one_of(tools.names, at)
        if not name or (yield from tape.char(at + len(name))) != ">":
            return False
        at = yield from tape.skip(at + len(name) + 1)
        if (yield from tape.char(at)) == "{":
            tape.take(at)
            yield CallBegun(name)
            yield from tape.tell_object()
        elif (yield from _begins_parameters(tape, at)):
            tape.take(at)
            yield CallBegun(name)
            yield from _parameters(tape, tools.properties(name))
        else:
            return False
        yield from take_tag(tape, CLOSE)
        return True


def take_tag(tape: Tape, tag: str) -> Wait[None]:
    """Take a closing tag and white space before it, or what the end of the text left of it."""
    at = yield from tape.skip(0)
    if (yield from tape.starts(tag, at)):
        tape.take(at + len(tag))
    elif tape.ended and tag.startswith(tape.text[at:]):
        tape.take(len(tape.text))


def _begins_parameters(tape: Tape, at: int) -> Wait[bool]:
    return (yield from tape.starts(PARAMETER, at)) or (yield from tape.starts(CLOSE, at))


def _parameters(tape: Tape, properties: Mapping[str, Any]) -> Read[None]:
    lead = "{"
    while True:
        at = yield from tape.skip(0)
        if not (yield from tape.starts(PARAMETER, at)):
            break
        at += len(PARAMETER)
        end = yield from _find(tape, (">",), at)
        stop = yield from _find(tape, (CLOSE_PARAMETER, PARAMETER, CLOSE), end + 1)
        if stop == len(tape.text):
            tape.take(stop)  # cut off: half a value is none
            return
        key, text = tape.text[at:end].strip("\"' "), tape.text[end + 1 : stop]
        tape.take(stop)
        yield from take_tag(tape, CLOSE_PARAMETER)
        value = _value(text.removeprefix("\n").removesuffix("\n"), properties.get(key))
        yield CallArguments(f"{lead}{json.dumps(key)}: {value}")
        lead = ", "
    if tape.text or lead == "{":
        yield CallArguments("{}" if lead == "{" else "}")


def _find(tape: Tape, marks: tuple[str, ...], at: int) -> Wait[int]:
    """Return the place of the first mark from `at` on; the text's end if there is none."""
    searched = at
    while True:
        found = [place for mark in marks if (place := tape.text.find(mark, searched)) >= 0]
        if found:
            return min(found)
        searched = max(at, len(tape.text) - max(map(len, marks)))
        if not (yield from tape.more(len(tape.text))):
            return len(tape.text)


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
