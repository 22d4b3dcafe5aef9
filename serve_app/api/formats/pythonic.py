"""Calls as Python writes them: `[f(city="Paris", days=3), g()]`, or one without the brackets.

Values are literals: strings, numbers, True, False, None, lists, tuples and dicts of them. They
are emitted as JSON while they come.
"""

from __future__ import annotations

import json
import math
import re

from serve_app.api.formats.buffer import (
    Buffer,
    CallArguments,
    CallBegun,
    Read,
    Tools,
    Wait,
    read_rest_of_list,
)

MAX_DEPTH = 32
_WORDS = {
    "True": "true", "False": "false", "None": "null", "true": "true", "false": "false",
    "null": "null",
}  # fmt: skip
_IDENTIFIER = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"
_SCALAR = _IDENTIFIER + "+-."
_ESCAPES = {
    "n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", "v": "\\u000b", "a": "\\u0007",
    "\\": "\\\\", '"': '\\"', "'": "'", "\n": "", "0": "\\u0000",
}  # fmt: skip
_CODE_LENGTHS = {"x": 2, "u": 4, "U": 8}


class PythonCall:
    """One call, which begins with the tool's name."""

    opening = ""

    def read(self, buffer: Buffer, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """See `table.Form`."""
        if not sure:
            return False
        called = yield from _call(buffer, at, tools, bare=True)
        return called


class PythonCalls:
    """A list of calls."""

    opening = "["

    def read(self, buffer: Buffer, at: int, tools: Tools, *, sure: bool) -> Read[bool]:  # noqa: ARG002
        """See `table.Form`."""
        if (yield from buffer.char(at)) != "[":
            return False
        at = yield from buffer.skip(at + 1)
        if not (yield from _call(buffer, at, tools, bare=False)):
            return False
        yield from read_rest_of_list(buffer, lambda at: _call(buffer, at, tools, bare=False))
        return True


def _call(buffer: Buffer, at: int, tools: Tools, *, bare: bool) -> Read[bool]:
    """Read a call from its name on, and take it; False if there is none."""
    name = yield from buffer.one_of(tools.names, at)
    if not name:
        return False
    at = yield from buffer.skip(at + len(name))
    if (yield from buffer.char(at)) != "(":
        return False
    at = yield from buffer.skip(at + 1)
    if (yield from buffer.char(at)) == ")":
        return (yield from _empty_call(buffer, at + 1, name, bare=bare))
    if not (yield from _begins_arguments(buffer, at, tools, name)):
        return False
    buffer.take(at)
    yield CallBegun(name)
    yield from _arguments(buffer, list(tools.properties(name)))
    return True


def _empty_call(buffer: Buffer, end: int, name: str, *, bare: bool) -> Read[bool]:
    if bare and (yield from buffer.more((yield from buffer.skip(end)))):
        return False  # `f() is a function` is no call
    buffer.take(end)
    yield CallBegun(name)
    yield CallArguments("{}")
    return True


def _begins_arguments(buffer: Buffer, at: int, tools: Tools, name: str) -> Wait[bool]:
    """Return whether a literal stands here, behind its keyword or in place of a parameter."""
    key, value = yield from _keyword(buffer, at)
    if not key and not tools.properties(name):
        return False
    first = yield from buffer.char(value)
    if first in ('"', "'", "[", "(", "{"):
        return True
    _, end = yield from _scalar(buffer, value)
    return end > value


def _keyword(buffer: Buffer, at: int) -> Wait[tuple[str, int]]:
    """Return a keyword and the place of its value; an empty one if the value stands here."""
    end = yield from buffer.skip(at, _IDENTIFIER)
    mark = yield from buffer.skip(end)
    if end == at or (yield from buffer.char(mark)) != "=":
        return "", at
    return buffer.text[at:end], (yield from buffer.skip(mark + 1))


def _scalar(buffer: Buffer, at: int) -> Wait[tuple[str, int]]:
    """Return a number or a word at a place as JSON, and its end; that is `at` if it is none."""
    end = yield from buffer.skip(at, _SCALAR)
    word = buffer.text[at:end]
    if word in _WORDS:
        return _WORDS[word], end
    for kind in (lambda text: int(text, 0), float):
        try:
            number = kind(word)
        except ValueError:
            continue
        if math.isfinite(number):
            return json.dumps(number), end
    return "", at


def _arguments(buffer: Buffer, positions: list[str]) -> Read[bool]:
    """Emit the arguments that begin here, and take the closing parenthesis.

    Args:
        buffer: the text.
        positions: the tool's parameters in order, for values without a keyword.
    """
    lead = "{"
    while True:
        at = yield from buffer.skip(0)
        if (yield from buffer.char(at)) == ")":
            buffer.take(at + 1)
            yield CallArguments("}")
            return True
        key, value = yield from _keyword(buffer, at)
        if not key and not positions:
            return False
        key = key or positions[0]
        positions = [name for name in positions if name != key]
        buffer.take(value)
        yield CallArguments(f"{lead}{json.dumps(key)}: ")
        if not (yield from _value(buffer, 0)) or not (yield from _comma(buffer, ")")):
            return False
        lead = ", "


def _comma(buffer: Buffer, closing: str) -> Wait[bool]:
    """Take a comma; False if neither it nor the closing mark, which stays, stands here."""
    at = yield from buffer.skip(0)
    mark = yield from buffer.char(at)
    if mark == ",":
        buffer.take(at + 1)
    return mark in (",", closing) and mark != ""


def _value(buffer: Buffer, depth: int) -> Read[bool]:
    """Emit the literal that begins here, and take it; False where it is none any more."""
    first = yield from buffer.char(0)
    if first in ('"', "'"):
        return (yield from _string(buffer, first))
    if first in ("[", "("):
        return (yield from _items(buffer, "]" if first == "[" else ")", depth))
    if first == "{":
        return (yield from _members(buffer, depth))
    text, end = yield from _scalar(buffer, 0)
    buffer.take(end)
    if text:
        yield CallArguments(text)
    return bool(text)


def _items(buffer: Buffer, closing: str, depth: int) -> Read[bool]:
    buffer.take(1)
    lead = "["
    while depth < MAX_DEPTH:
        at = yield from buffer.skip(0)
        if (yield from buffer.char(at)) == closing:
            buffer.take(at + 1)
            yield CallArguments("[]" if lead == "[" else "]")
            return True
        buffer.take(at)
        if not buffer.text:
            return False
        yield CallArguments(lead)
        if not (yield from _value(buffer, depth + 1)) or not (yield from _comma(buffer, closing)):
            return False
        lead = ", "
    return False


def _members(buffer: Buffer, depth: int) -> Read[bool]:
    buffer.take(1)
    lead = "{"
    while depth < MAX_DEPTH:
        at = yield from buffer.skip(0)
        if (yield from buffer.char(at)) == "}":
            buffer.take(at + 1)
            yield CallArguments("{}" if lead == "{" else "}")
            return True
        buffer.take(at)
        if not buffer.text:
            return False
        yield CallArguments(lead)
        if not (yield from _key(buffer)):
            return False
        yield CallArguments(": ")
        if not (yield from _value(buffer, depth + 1)) or not (yield from _comma(buffer, "}")):
            return False
        lead = ", "
    return False


def _key(buffer: Buffer) -> Read[bool]:
    """Emit a dict's key as a string, and take it with its colon."""
    first = yield from buffer.char(0)
    if first in ('"', "'"):
        known = yield from _string(buffer, first)
    else:
        text, end = yield from _scalar(buffer, 0)
        buffer.take(end)
        known = bool(text)
        yield CallArguments(json.dumps(text))
    at = yield from buffer.skip(0)
    if not known or (yield from buffer.char(at)) != ":":
        return False
    buffer.take((yield from buffer.skip(at + 1)))
    return True


def _string(buffer: Buffer, quote: str) -> Read[bool]:
    """Emit a string as JSON while it comes, and take it; False if it has no end."""
    if (yield from buffer.starts(quote * 3, 0)):
        quote *= 3
    buffer.take(len(quote))
    yield CallArguments('"')
    marks = re.compile(rf"[{quote[0]}\\]")
    while (yield from buffer.more(0)):
        found = marks.search(buffer.text)
        if text := buffer.take(found.start() if found else len(buffer.text)):
            yield CallArguments(_inside(text))
        elif buffer.text[0] == "\\":
            if not (yield from _escape(buffer)):
                return False
        elif (yield from buffer.starts(quote, 0)):
            buffer.take(len(quote))
            yield CallArguments('"')
            return True
        else:  # one quote within a string of three
            yield CallArguments(_inside(buffer.take(1)))
    return False


def _inside(text: str) -> str:
    """Return a text as it stands in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _escape(buffer: Buffer) -> Read[bool]:
    """Emit the escape that begins here as JSON; False if it is cut."""
    kind = yield from buffer.char(1)
    if not kind:
        return False
    length = _CODE_LENGTHS.get(kind, 0)
    yield from buffer.more(1 + length)
    escape = buffer.take(2 + length)
    if length and (code := _code(escape[2:])) is not None:
        yield CallArguments(code)
    elif kind in _ESCAPES:
        yield CallArguments(_ESCAPES[kind])
    else:  # Python keeps what it does not know
        yield CallArguments(_inside(escape))
    return True


def _code(digits: str) -> str | None:
    """Return a character's code as JSON; halves of a pair meet there."""
    try:
        code = int(digits, 16)
    except ValueError:
        return None
    if code > 0x10FFFF:
        return None
    return f"\\u{code:04x}" if code < 0x10000 else json.dumps(chr(code))[1:-1]
