"""Calls as JSON objects, `{"name": "f", "parameters": {…}}`, alone or in a list.

The keys may come in any order; the arguments may be an object, the same as a string, null or
absent. `{"type": "function", "function": …}` around the call, or in place of its name, is read
as well.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from pydantic_core import from_json

from serve_app.api.formats.buffer import (
    Buffer,
    CallArguments,
    CallBegun,
    Read,
    Tools,
    Wait,
    read_rest_of_list,
)

_NAMES, _ARGUMENTS = ("name", "function"), ("parameters", "arguments", "args", "input")
_KEYS = (*_NAMES, *_ARGUMENTS, "type", "id")
NO_ARGUMENTS = "{}"
_QUOTED = re.compile(r'["\\]')


class JsonCall:
    """One object."""

    opening = "{"

    def read(self, buffer: Buffer, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """See `table.Form`."""
        if (yield from buffer.char(at)) != "{":
            return False
        return (yield from _Object(buffer, tools, sure=sure).read(at))


class JsonCalls:
    """A list of such objects."""

    opening = "["

    def read(self, buffer: Buffer, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """See `table.Form`."""
        if (yield from buffer.char(at)) != "[":
            return False
        at = yield from buffer.skip(at + 1)
        one = JsonCall()
        if not (yield from one.read(buffer, at, tools, sure=sure)):
            return False
        yield from read_rest_of_list(buffer, lambda at: one.read(buffer, at, tools, sure=True))
        return True


@dataclass(slots=True)
class _Object:
    """The reading of one call.

    Args:
        buffer: the text.
        tools: that may be called.
        sure: a call is expected here, so that one without arguments is one.
        name: as far as it was read.
        arguments: all of them as text, if they came before the name.
    """

    buffer: Buffer
    tools: Tools
    sure: bool
    name: str = ""
    arguments: str | None = None

    def read(self, at: int) -> Read[bool]:
        """Read the members until there is a call, emit it, and take the object to its end."""
        buffer = self.buffer
        while True:
            at = yield from buffer.skip(at + 1)  # behind the brace or a comma
            key, at = yield from self._key(at)
            if not key:
                return False
            if key in _ARGUMENTS and self.name and (yield from self._emit(at)):
                return True
            if key == "function" and (yield from buffer.char(at)) == "{":
                return (yield from self._nested(at))
            end = yield from self._member(key, at)
            if end is None:
                return False
            at = yield from buffer.skip(end)
            mark = yield from buffer.char(at)
            if mark == "}":
                return (yield from self._complete(at + 1))
            if mark != ",":
                return False

    def _key(self, at: int) -> Wait[tuple[str, int]]:
        """Return a key that a call may have, and the place of its value."""
        for key in _KEYS:
            if (yield from self.buffer.starts(f'"{key}"', at)):
                at = yield from self.buffer.skip(at + len(key) + 2)
                if (yield from self.buffer.char(at)) != ":":
                    break
                return key, (yield from self.buffer.skip(at + 1))
        return "", at

    def _member(self, key: str, at: int) -> Wait[int | None]:
        """Take a member in and return its end; None if this cannot be a call."""
        buffer = self.buffer
        if key in _NAMES:
            if not (yield from buffer.starts('"', at)):
                return None
            self.name = yield from buffer.one_of(self.tools.names, at + 1)
            quote = at + 1 + len(self.name)
            return quote + 1 if self.name and (yield from buffer.starts('"', quote)) else None
        if key == "type":
            known = yield from buffer.starts('"function"', at)
            return at + len('"function"') if known else None
        end = yield from buffer.value_end(at)
        if end is not None and key in _ARGUMENTS:
            self.arguments = _object(buffer.text[at:end])
            return end if self.arguments is not None else None
        return end

    def _emit(self, at: int) -> Read[bool]:
        """Emit the call whose arguments begin here while they come; False if they cannot."""
        buffer = self.buffer
        first = yield from buffer.char(at)
        if first == "{":
            inner = yield from buffer.skip(at + 1)
            if (yield from buffer.char(inner)) not in ('"', "}"):
                return False
            buffer.take(at)
            yield CallBegun(self.name)
            complete = yield from buffer.emit_object()
        elif first == '"':
            inner = yield from buffer.skip(at + 1)
            if (yield from buffer.char(inner)) != "{":
                return False
            buffer.take(at + 1)
            yield CallBegun(self.name)
            complete = yield from _emit_quoted(buffer)
        else:
            return False
        if complete:
            yield from self._rest()
        return True

    def _nested(self, at: int) -> Read[bool]:
        inner = _Object(self.buffer, self.tools, sure=self.sure, arguments=self.arguments)
        called = yield from inner.read(at)
        if called:
            yield from self._rest()
        return called

    def _complete(self, end: int) -> Read[bool]:
        """Emit a call whose object has ended."""
        if not self.name or (self.arguments is None and not self.sure):
            return False
        self.buffer.take(end)
        yield CallBegun(self.name)
        yield CallArguments(self.arguments or NO_ARGUMENTS)
        return True

    def _rest(self) -> Wait[None]:
        """Take the members behind the arguments, and the brace."""
        buffer = self.buffer
        while True:
            at = yield from buffer.skip(0)
            mark = yield from buffer.char(at)
            if mark == "}":
                buffer.take(at + 1)
                return
            if mark != "," or (end := (yield from self._any_member(at + 1))) is None:
                if buffer.ended and mark in ("", ","):
                    buffer.take(len(buffer.text))  # cut off within the call
                return
            buffer.take(end)

    def _any_member(self, at: int) -> Wait[int | None]:
        buffer = self.buffer
        at = yield from buffer.skip(at)
        if (yield from buffer.char(at)) != '"':
            return None
        end = yield from buffer.string_end(at)
        if end is None:
            return None
        at = yield from buffer.skip(end)
        if (yield from buffer.char(at)) != ":":
            return None
        at = yield from buffer.skip(at + 1)
        return (yield from buffer.value_end(at))


def _object(text: str) -> str | None:
    """Return complete arguments as the text of an object; None if they are none."""
    try:
        value = from_json(text, allow_inf_nan=False)
        if isinstance(value, str):
            value = from_json(value or NO_ARGUMENTS, allow_inf_nan=False)
    except ValueError:
        return None
    value = {} if value is None else value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _emit_quoted(buffer: Buffer) -> Read[bool]:
    """Emit the arguments in the string that goes on here; False if it is cut."""
    while True:
        found = _QUOTED.search(buffer.text)
        if text := buffer.take(found.start() if found else len(buffer.text)):
            yield CallArguments(text)
        if found is None:
            if not (yield from buffer.more(0)):
                return False
        elif found[0] == '"':
            buffer.take(1)
            return True
        else:
            length = yield from _escape_length(buffer)
            text = _unescaped(buffer.take(length))
            if not text:
                return False
            yield CallArguments(text)


def _escape_length(buffer: Buffer) -> Wait[int]:
    """Return the length of the escape that begins here, both halves of a pair together."""
    if (yield from buffer.char(1)) != "u":
        return 2
    yield from buffer.more(5)
    paired = buffer.text[2:4].lower() in ("d8", "d9", "da", "db")
    if paired and (yield from buffer.starts("\\u", 6)):
        yield from buffer.more(11)
        return 12
    return 6


def _unescaped(escape: str) -> str:
    try:
        text: str = json.loads(f'"{escape}"')
    except ValueError:
        return ""
    return text.encode("utf-8", "replace").decode()  # half a pair is no character
