"""Calls as Python writes them: `[f(city="Paris", days=3), g()]`, or one without the brackets.

Values are literals: strings, numbers, True, False, None, lists, tuples and dicts of them. They
are told as JSON while they come.
"""

from __future__ import annotations

import json
import math
import re

from serve_app.api.formats.tape import CallArguments, CallBegun, Read, Tape, Tools, Wait

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

    def read(self, tape: Tape, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """See `table.Form`."""
        if not sure:
            return False
        called = yield from _call(tape, at, tools, bare=True)
        return called


class PythonCalls:
    """A list of calls."""

    opening = "["

    def read(self, tape: Tape, at: int, tools: Tools, *, sure: bool) -> Read[bool]:  # noqa: ARG002
        """See `table.Form`."""
        if (yield from tape.char(at)) != "[":
            return False
        at = yield from tape.skip(at + 1)
        if not (yield from _call(tape, at, tools, bare=False)):
            return False
        while True:
            at = yield from tape.skip(0)
            mark = yield from tape.char(at)
            if mark == "]":
                tape.take(at + 1)
                return True
            at = yield from tape.skip(at + 1)
            tape.short = False
            if mark != "," or not (yield from _call(tape, at, tools, bare=False)):
                tape.drop_beginning()
                return True


def _call(tape: Tape, at: int, tools: Tools, *, bare: bool) -> Read[bool]:
    """Read a call from its name on, and take it; False if there is none."""
    name = yield from tape.one_of(tools.names, at)
    if not name:
        return False
    at = yield from tape.skip(at + len(name))
    if (yield from tape.char(at)) != "(":
        return False
    at = yield from tape.skip(at + 1)
    if (yield from tape.char(at)) == ")":
        return (yield from _empty_call(tape, at + 1, name, bare=bare))
    if not (yield from _begins_arguments(tape, at, tools, name)):
        return False
    tape.take(at)
    yield CallBegun(name)
    yield from _arguments(tape, list(tools.properties(name)))
    return True


def _empty_call(tape: Tape, end: int, name: str, *, bare: bool) -> Read[bool]:
    if bare and (yield from tape.more((yield from tape.skip(end)))):
        return False  # `f() is a function` is no call
    tape.take(end)
    yield CallBegun(name)
    yield CallArguments("{}")
    return True


def _begins_arguments(tape: Tape, at: int, tools: Tools, name: str) -> Wait[bool]:
    """Tell whether a literal stands here, behind its keyword or in place of a parameter."""
    key, value = yield from _keyword(tape, at)
    if not key and not tools.properties(name):
        return False
    first = yield from tape.char(value)
    if first in ('"', "'", "[", "(", "{"):
        return True
    _, end = yield from _scalar(tape, value)
    return end > value


def _keyword(tape: Tape, at: int) -> Wait[tuple[str, int]]:
    """Return a keyword and the place of its value; an empty one if the value stands here."""
    end = yield from tape.skip(at, _IDENTIFIER)
    mark = yield from tape.skip(end)
    if end == at or (yield from tape.char(mark)) != "=":
        return "", at
    return tape.text[at:end], (yield from tape.skip(mark + 1))


def _scalar(tape: Tape, at: int) -> Wait[tuple[str, int]]:
    """Return a number or a word at a place as JSON, and its end; that is `at` if it is none."""
    end = yield from tape.skip(at, _SCALAR)
    word = tape.text[at:end]
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


def _arguments(tape: Tape, positions: list[str]) -> Read[bool]:
    """Tell the arguments that begin here, and take the closing parenthesis.

    Args:
        tape: the text.
        positions: the tool's parameters in order, for values without a keyword.
    """
    lead = "{"
    while True:
        at = yield from tape.skip(0)
        if (yield from tape.char(at)) == ")":
            tape.take(at + 1)
            yield CallArguments("}")
            return True
        key, value = yield from _keyword(tape, at)
        if not key and not positions:
            return False
        key = key or positions[0]
        positions = [name for name in positions if name != key]
        tape.take(value)
        yield CallArguments(f"{lead}{json.dumps(key)}: ")
        if not (yield from _value(tape, 0)) or not (yield from _comma(tape, ")")):
            return False
        lead = ", "


def _comma(tape: Tape, closing: str) -> Wait[bool]:
    """Take a comma; False if neither it nor the closing mark, which stays, stands here."""
    at = yield from tape.skip(0)
    mark = yield from tape.char(at)
    if mark == ",":
        tape.take(at + 1)
    return mark in (",", closing) and mark != ""


def _value(tape: Tape, depth: int) -> Read[bool]:
    """Tell the literal that begins here, and take it; False where it is none any more."""
    first = yield from tape.char(0)
    if first in ('"', "'"):
        return (yield from _string(tape, first))
    if first in ("[", "("):
        return (yield from _items(tape, "]" if first == "[" else ")", depth))
    if first == "{":
        return (yield from _members(tape, depth))
    text, end = yield from _scalar(tape, 0)
    tape.take(end)
    if text:
        yield CallArguments(text)
    return bool(text)


def _items(tape: Tape, closing: str, depth: int) -> Read[bool]:
    tape.take(1)
    lead = "["
    while depth < MAX_DEPTH:
        at = yield from tape.skip(0)
        if (yield from tape.char(at)) == closing:
            tape.take(at + 1)
            yield CallArguments("[]" if lead == "[" else "]")
            return True
        tape.take(at)
        if not tape.text:
            return False
        yield CallArguments(lead)
        if not (yield from _value(tape, depth + 1)) or not (yield from _comma(tape, closing)):
            return False
        lead = ", "
    return False


def _members(tape: Tape, depth: int) -> Read[bool]:
    tape.take(1)
    lead = "{"
    while depth < MAX_DEPTH:
        at = yield from tape.skip(0)
        if (yield from tape.char(at)) == "}":
            tape.take(at + 1)
            yield CallArguments("{}" if lead == "{" else "}")
            return True
        tape.take(at)
        if not tape.text:
            return False
        yield CallArguments(lead)
        if not (yield from _key(tape)):
            return False
        yield CallArguments(": ")
        if not (yield from _value(tape, depth + 1)) or not (yield from _comma(tape, "}")):
            return False
        lead = ", "
    return False


def _key(tape: Tape) -> Read[bool]:
    """Tell a dict's key as a string, and take it with its colon."""
    first = yield from tape.char(0)
    if first in ('"', "'"):
        known = yield from _string(tape, first)
    else:
        text, end = yield from _scalar(tape, 0)
        tape.take(end)
        known = bool(text)
        yield CallArguments(json.dumps(text))
    at = yield from tape.skip(0)
    if not known or (yield from tape.char(at)) != ":":
        return False
    tape.take((yield from tape.skip(at + 1)))
    return True


def _string(tape: Tape, quote: str) -> Read[bool]:
    """Tell a string as JSON while it comes, and take it; False if it has no end."""
    if (yield from tape.starts(quote * 3, 0)):
        quote *= 3
    tape.take(len(quote))
    yield CallArguments('"')
    marks = re.compile(rf"[{quote[0]}\\]")
    while True:
        found = marks.search(tape.text)
        if text := tape.take(found.start() if found else len(tape.text)):
            yield CallArguments(json.dumps(text, ensure_ascii=False)[1:-1])
        if found is None:
            if not (yield from tape.more(0)):
                return False
        elif found[0] == "\\":
            if not (yield from _escape(tape)):
                return False
        elif (yield from tape.starts(quote, 0)):
            tape.take(len(quote))
            yield CallArguments('"')
            return True
        else:  # one quote within a string of three
            yield CallArguments(json.dumps(tape.take(1))[1:-1])


def _escape(tape: Tape) -> Read[bool]:
    """Tell the escape that begins here as JSON; False if it is cut."""
    kind = yield from tape.char(1)
    if not kind:
        return False
    length = _CODE_LENGTHS.get(kind, 0)
    yield from tape.more(1 + length)
    escape = tape.take(2 + length)
    if length and (code := _code(escape[2:])) is not None:
        yield CallArguments(code)
    elif kind in _ESCAPES:
        yield CallArguments(_ESCAPES[kind])
    else:  # Python keeps what it does not know
        yield CallArguments(json.dumps(escape, ensure_ascii=False)[1:-1])
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
