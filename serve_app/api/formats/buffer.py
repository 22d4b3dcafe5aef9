"""Text as it comes, and ways to read it that wait for more.

A form is read by generators: one that needs text that is not there yet yields None and goes on
when there is more, so it is written as if all of the text were there. What it decides cannot
depend on how the text was cut into pieces, because nothing else is decided by the pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

T = TypeVar("T")
MAX_SEARCHED = 2**22  # characters
SPACE = " \t\r\n\f\v"
_NAME = re.compile(r"[\w./-]")
_BRACKETS = re.compile(r'[{}\[\]"]')
_BRACES = re.compile(r'[{}"\\]')
_QUOTED = re.compile(r'["\\]')
_SCALAR_END = re.compile(r"[\s,\]}]")


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call of a known tool begins; what follows until the next one are its arguments."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the latest call's arguments, a JSON object as the model writes it."""

    text: str


Part: TypeAlias = Content | CallBegun | CallArguments
Wait: TypeAlias = Generator[None, None, T]  # looks ahead
Read: TypeAlias = Generator[Part | None, None, T]  # emits parts as well


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools that may be called.

    Args:
        names: all of them.
        parameters: the JSON schema of each one's arguments, as far as it is known.
    """

    names: frozenset[str]
    parameters: Mapping[str, Mapping[str, Any]]

    def properties(self, name: str) -> Mapping[str, Any]:
        """Return the schemas of a tool's arguments by their names, in order."""
        found = self.parameters.get(name, {}).get("properties")
        return found if isinstance(found, Mapping) else {}


class Buffer:
    """The part of a text that is not emitted yet.

    Places are counted from its beginning; `take` moves it. Methods that return a `Wait` look
    ahead as far as they need, and see an empty text behind the end.
    """

    def __init__(self) -> None:
        self.text = ""
        self.ended = False
        self._searched = 0
        self.short = False  # a look ahead met the end where more might have decided otherwise

    def take(self, length: int) -> str:
        """Remove and return the first characters."""
        taken, self.text = self.text[:length], self.text[length:]
        return taken

    def drop_beginning(self) -> None:
        """Drop what the end of the text left of one more call."""
        if self.ended and self.short:
            self.take(len(self.text))

    def more(self, at: int) -> Wait[bool]:
        """Wait for a character at a place; False if there is none."""
        while at >= len(self.text):
            if self.ended:
                self.short = True
                return False
            yield None
        return True

    def char(self, at: int) -> Wait[str]:
        """Return the character at a place."""
        return self.text[at] if (yield from self.more(at)) else ""

    def starts(self, literal: str, at: int) -> Wait[bool]:
        """Return whether a literal stands at a place; waits only while it may."""
        while not self.text.startswith(literal, at):
            if not literal.startswith(self.text[at : at + len(literal)]):
                return False
            if not (yield from self.more(len(self.text))):
                return False
        return True

    def skip(self, at: int, chars: str = SPACE) -> Wait[int]:
        """Return the place of the first character from `at` on that is none of `chars`."""
        while (yield from self.more(at)) and self.text[at] in chars:
            at += 1
        return at

    def one_of(self, words: Collection[str], at: int) -> Wait[str]:
        """Return the longest of some names that stands at a place and ends there, if one does."""
        while True:
            rest = self.text[at:]
            undecided = [word for word in words if len(word) >= len(rest) and word.startswith(rest)]
            if not undecided or not (yield from self.more(len(self.text))):
                break
        found = [w for w in words if rest.startswith(w) and not _NAME.match(rest, len(w))]
        return max(found, key=len, default="")

    def string_end(self, at: int) -> Wait[int | None]:
        """Return the place after the JSON string that begins at a quote; None if it has no end."""
        at += 1
        while True:
            found = _QUOTED.search(self.text, at)
            if found and found[0] == '"':
                return found.end()
            at = found.end() + 1 if found else len(self.text)
            if not (yield from self.more(at)):
                return None

    def value_end(self, at: int) -> Wait[int | None]:
        """Return the place after a JSON value, whose inside is not looked at; None if open.

        A text with very many beginnings of objects would be searched to its end for each, so
        there is a limit to what is searched for one text.
        """
        if self._searched > MAX_SEARCHED:
            return None
        end = yield from self._value_end(at)
        self._searched += (len(self.text) if end is None else end) - at
        return end

    def _value_end(self, at: int) -> Wait[int | None]:
        first = yield from self.char(at)
        if first == '"':
            return (yield from self.string_end(at))
        if first in ("{", "["):
            return (yield from self._brackets_end(at))
        while not (found := _SCALAR_END.search(self.text, at)):
            if not (yield from self.more(len(self.text))):
                return None
        return found.start() if found.start() > at else None

    def _brackets_end(self, at: int) -> Wait[int | None]:
        depth = 0
        while True:
            found = _BRACKETS.search(self.text, at)
            if found is None:
                at = len(self.text)
                if not (yield from self.more(at)):
                    return None
                continue
            end: int | None = found.end()
            if found[0] == '"':
                end = yield from self.string_end(found.start())
            else:
                depth += 1 if found[0] in "{[" else -1
            if end is None or depth == 0:
                return end
            at = end

    def emit_object(self) -> Read[bool]:
        """Emit the JSON object that begins here as arguments while it comes; False if cut."""
        scan = _Braces()
        while True:
            end = scan.end(self.text)
            text = self.take(len(self.text) if end is None else end)
            scan.drop(len(text))
            if text:
                yield CallArguments(text)
            if end is not None:
                return True
            if not (yield from self.more(0)):
                return False


class _Braces:
    """Finds the brace that closes an object, through strings and escapes, reading text once."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._next = 0

    def drop(self, length: int) -> None:
        """Expect a text without its first `length` characters; they may end in an escape."""
        self._next = max(0, self._next - length)

    def end(self, text: str) -> int | None:
        """Return the place after the closing brace of the object that the text begins with."""
        at = self._next
        while found := _BRACES.search(text, at):
            at = found.end()
            if found[0] == "\\":
                at += 1
            elif found[0] == '"':
                self._quoted = not self._quoted
            elif not self._quoted:
                self._depth += 1 if found[0] == "{" else -1
                if self._depth == 0:
                    return at
        self._next = max(at, len(text))
        return None


def read_rest_of_list(buffer: Buffer, read: Callable[[int], Read[bool]]) -> Read[None]:
    """Read what follows the first call of a list, and take it up to the closing bracket.

    Args:
        buffer: begins behind the first call.
        read: reads one call at a place; False if there is none.
    """
    while True:
        at = yield from buffer.skip(0)
        mark = yield from buffer.char(at)
        if mark == "]":
            buffer.take(at + 1)
            return
        at = yield from buffer.skip(at + 1)
        buffer.short = False
        if mark != "," or not (yield from read(at)):
            buffer.drop_beginning()
            return
