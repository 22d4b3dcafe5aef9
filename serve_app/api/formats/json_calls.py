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

from serve_app.api.formats.tape import CallArguments, CallBegun, Read, Tape, Tools, Wait

_NAMES, _ARGUMENTS = ("name", "function"), ("parameters", "arguments")
_KEYS = (*_NAMES, *_ARGUMENTS, "type", "id")
NO_ARGUMENTS = "{}"
_QUOTED = re.compile(r'["\\]')


class JsonCall:
    """One object."""

    opening = "{"

    def read(self, tape: Tape, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """See `table.Form`."""
        if (yield from tape.char(at)) != "{":
            return False
        return (yield from _Object(tape, tools, sure=sure).read(at))


class JsonCalls:
    """A list of such objects."""

    opening = "["

    def read(self, tape: Tape, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """See `table.Form`."""
        if (yield from tape.char(at)) != "[":
            return False
        at = yield from tape.skip(at + 1)
        one = JsonCall()
        if not (yield from one.read(tape, at, tools, sure=sure)):
            return False
        while True:
            at = yield from tape.skip(0)
            mark = yield from tape.char(at)
            if mark == "]":
                tape.take(at + 1)
                return True
            at = yield from tape.skip(at + 1)
            tape.short = False
            if mark != "," or not (yield from one.read(tape, at, tools, sure=True)):
                tape.drop_beginning()
                return True


@dataclass(slots=True)
class _Object:
    """The reading of one call.

    Args:
        tape: the text.
        tools: that may be called.
        sure: a call is expected here, so that one without arguments is one.
        name: as far as it was read.
        arguments: a whole text of them, if they came before the name.
    """

    tape: Tape
    tools: Tools
    sure: bool
    name: str = ""
    arguments: str | None = None

    def read(self, at: int) -> Read[bool]:
        """Read the members until there is a call, tell it, and take the whole object."""
        tape = self.tape
        while True:
            at = yield from tape.skip(at + 1)  # behind the brace or a comma
            key, at = yield from self._key(at)
            if not key:
                return False
            if key in _ARGUMENTS and self.name and (yield from self._tell(at)):
                return True
            if key == "function" and (yield from tape.char(at)) == "{":
                return (yield from self._nested(at))
            end = yield from self._member(key, at)
            if end is None:
                return False
            at = yield from tape.skip(end)
            mark = yield from tape.char(at)
            if mark == "}":
                return (yield from self._whole(at + 1))
            if mark != ",":
                return False

    def _key(self, at: int) -> Wait[tuple[str, int]]:
        """Return a key that a call may have, and the place of its value."""
        for key in _KEYS:
            if (yield from self.tape.starts(f'"{key}"', at)):
                at = yield from self.tape.skip(at + len(key) + 2)
                if (yield from self.tape.char(at)) != ":":
                    break
                return key, (yield from self.tape.skip(at + 1))
        return "", at

    def _member(self, key: str, at: int) -> Wait[int | None]:
        """Take a member in and return its end; None if this cannot be a call."""
        tape = self.tape
        if key in _NAMES:
            if not (yield from tape.starts('"', at)):
                return None
            self.name = yield from tape.one_of(self.tools.names, at + 1)
            end = at + 1 + len(self.name)
            return end + 1 if self.name and (yield from tape.starts('"', end)) else None
        if key == "type":
            known = yield from tape.starts('"function"', at)
            return at + len('"function"') if known else None
        end = yield from tape.value_end(at)
        if end is not None and key in _ARGUMENTS:
            self.arguments = _object(tape.text[at:end])
            return end if self.arguments is not None else None
        return end

    def _tell(self, at: int) -> Read[bool]:
        """Tell the call whose arguments begin here while they come; False if they cannot."""
        tape = self.tape
        first = yield from tape.char(at)
        if first == "{":
            inner = yield from tape.skip(at + 1)
            if (yield from tape.char(inner)) not in ('"', "}"):
                return False
            tape.take(at)
            yield CallBegun(self.name)
            whole = yield from tape.tell_object()
        elif first == '"':
            inner = yield from tape.skip(at + 1)
            if (yield from tape.char(inner)) != "{":
                return False
            tape.take(at + 1)
            yield CallBegun(self.name)
            whole = yield from _tell_quoted(tape)
        else:
            return False
        if whole:
            yield from self._rest()
        return True

    def _nested(self, at: int) -> Read[bool]:
        inner = _Object(self.tape, self.tools, sure=self.sure, arguments=self.arguments)
        called = yield from inner.read(at)
        if called:
            yield from self._rest()
        return called

    def _whole(self, end: int) -> Read[bool]:
        """Tell a call whose object has ended."""
        if not self.name or (self.arguments is None and not self.sure):
            return False
        self.tape.take(end)
        yield CallBegun(self.name)
        yield CallArguments(self.arguments or NO_ARGUMENTS)
        return True

    def _rest(self) -> Wait[None]:
        """Take the members behind the arguments, and the brace."""
        tape = self.tape
        while True:
            at = yield from tape.skip(0)
            mark = yield from tape.char(at)
            if mark == "}":
                tape.take(at + 1)
                return
            if mark != "," or (end := (yield from self._any_member(at + 1))) is None:
                if tape.ended and mark in ("", ","):
                    tape.take(len(tape.text))  # cut off within the call
                return
            tape.take(end)

    def _any_member(self, at: int) -> Wait[int | None]:
        tape = self.tape
        at = yield from tape.skip(at)
        if (yield from tape.char(at)) != '"':
            return None
        end = yield from tape.string_end(at)
        if end is None:
            return None
        at = yield from tape.skip(end)
        if (yield from tape.char(at)) != ":":
            return None
        at = yield from tape.skip(at + 1)
        return (yield from tape.value_end(at))


def _object(text: str) -> str | None:
    """Return whole arguments as the text of an object; None if they are none."""
    try:
        value = from_json(text, allow_inf_nan=False)
        if isinstance(value, str):
            value = from_json(value or NO_ARGUMENTS, allow_inf_nan=False)
    except ValueError:
        return None
    value = {} if value is None else value
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else None


def _tell_quoted(tape: Tape) -> Read[bool]:
    """Tell the arguments in the string that goes on here; False if it is cut."""
    while True:
        found = _QUOTED.search(tape.text)
        if text := tape.take(found.start() if found else len(tape.text)):
            yield CallArguments(text)
        if found is None:
            if not (yield from tape.more(0)):
                return False
        elif found[0] == '"':
            tape.take(1)
            return True
        else:
            length = yield from _escape_length(tape)
            text = _unescaped(tape.take(length))
            if not text:
                return False
            yield CallArguments(text)


def _escape_length(tape: Tape) -> Wait[int]:
    """Return the length of the escape that begins here, both halves of a pair together."""
    if (yield from tape.char(1)) != "u":
        return 2
    yield from tape.more(5)
    paired = tape.text[2:4].lower() in ("d8", "d9", "da", "db")
    if paired and (yield from tape.starts("\\u", 6)):
        yield from tape.more(11)
        return 12
    return 6


def _unescaped(escape: str) -> str:
    try:
        text: str = json.loads(f'"{escape}"')
    except ValueError:
        return ""
    return text.encode("utf-8", "replace").decode()  # half a pair is no character
