"""Reads tool calls out of a model's text, as it comes, in the forms that models write them.

    <|python_tag|>{"name": "f", "parameters": {…}}; {…}            Llama 3, the tag is optional
    [{"name": "f", "parameters": {…}}, …]                          what `tools.py` enforces
    words <tool_call>{"name": "f", "arguments": {…}}</tool_call>   Hermes, Qwen

A bare call stands at the start of the text or after another bare call; a tagged one anywhere.
Only an object that names a known tool is a call; every other text stays content. A call is
told as soon as its name is known and its arguments begin, and the arguments follow piece by
piece. How the text is cut into pieces never changes what is read, and nothing of it is lost
but the syntax around calls: brackets, tags, separators and the white space that touches them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeAlias

from pydantic_core import from_json

_OPEN, _CLOSE, _PYTHON = "<tool_call>", "</tool_call>", "<|python_tag|>"
_AT_START = re.compile(r"\s*(?:<\|python_tag\|>\s*)?(?:\[\s*)?")
_AFTER_CALL = re.compile(r"[\s;,\]]*(?:<\|python_tag\|>\s*)?")
_SYNTAX_AFTER_CALL = re.compile(r"[\s;,\]]*")
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]+)"\s*,\s*"(?:parameters|arguments)"\s*:\s*(?=\{)')
_FIRST_KEY = re.compile(r'\{\s*(?:"([^"\\]*)("?)|[^\s"])')
_KEYS = ("name", "parameters", "arguments", "type")  # what a call's object may begin with
_BRACES = re.compile(r'[{}"\\]')


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


class ToolReader:
    """Parts one completion's text into content and calls.

    Args:
        names: of the tools that may be called.
        parallel: more than one call is one; otherwise what follows the first is content.
    """

    def __init__(self, names: Collection[str], *, parallel: bool = True) -> None:
        self._names = frozenset(names)
        self._parallel = parallel
        self._held = ""  # not told yet
        self._brace = 0  # where in it an object begins that may be a call
        self._braces = _Braces()
        self._tagged = False
        self._bare: re.Pattern[str] | None = _AT_START  # what may precede a bare call here
        self._told_call = False  # a call is the last thing that was told
        self._step: Callable[[], list[Part] | None] = self._seek

    def read(self, text: str) -> list[Part]:
        """Return what is certain after more text."""
        self._held += text
        parts: list[Part] = []
        while (more := self._step()) is not None:
            parts += more
        return parts

    def end(self) -> list[Part]:
        """Return what is left when no more text comes; a call that broke off stays as told."""
        held, self._held = self._held, ""
        if self._step in (self._close_object, self._close_tag):
            return []
        if self._told_call and _SYNTAX_AFTER_CALL.fullmatch(held):
            return []
        return [Content(held)] if held else []

    # Each step returns what it told, or None when it needs more text to go on.

    def _seek(self) -> list[Part] | None:
        if self._bare is not None:
            start = _end_of(self._bare, self._held)
            rest = self._held[start:]
            if _PYTHON.startswith(rest):
                return None
            if rest[0] == "{":
                return self._open(0, start, tagged=False)
            self._bare = None
        at = self._held.find(_OPEN)
        if at < 0:
            return self._tell(_length_before(self._held, _OPEN))
        start = at + len(_OPEN)
        brace = start + _indent(self._held[start:])
        if brace == len(self._held):
            return self._tell(_length_before(self._held[:at], ""))
        if self._held[brace] != "{":
            return self._tell(start)
        return self._open(_length_before(self._held[:at], ""), brace, tagged=True)

    def _tell(self, length: int) -> list[Part] | None:
        if not length:
            return None
        text, self._held = self._held[:length], self._held[length:]
        self._told_call = False
        return [Content(text)]

    def _open(self, start: int, brace: int, *, tagged: bool) -> list[Part]:
        told = self._tell(start) or []
        self._brace, self._tagged, self._braces = brace - start, tagged, _Braces()
        self._step = self._object
        return told

    def _object(self) -> list[Part] | None:
        if head := _HEAD.match(self._held, self._brace):
            if head[1] not in self._names:
                return self._refuse()
            self._braces = _Braces()
            return self._begin(head[1], head.end(), self._arguments)
        key = _FIRST_KEY.match(self._held, self._brace)
        if key and not _may_be_key(key[1], closed=bool(key[2])):
            return self._refuse()
        end = self._braces.end(self._held, self._brace)
        if end is None:
            return None
        call = _parse(self._held[self._brace : end])
        if call is None or call[0] not in self._names:
            return self._refuse()
        begun = self._begin(call[0], end, self._close_tag)
        return [*begun, CallArguments(call[1])]

    def _refuse(self) -> list[Part]:
        self._step, self._bare = self._seek, None
        return self._tell(self._brace + 1) or []

    def _begin(self, name: str, consumed: int, then: Callable[[], list[Part] | None]) -> list[Part]:
        self._held = self._held[consumed:]
        self._step, self._told_call = then, True
        if not self._parallel:
            self._names = frozenset()
        return [CallBegun(name)]

    def _arguments(self) -> list[Part] | None:
        end = self._braces.end(self._held, 0)
        text = self._held if end is None else self._held[:end]
        self._braces.drop(len(text))
        if end is not None:
            self._step = self._close_object
        self._held = self._held[len(text) :]
        return [CallArguments(text)] if text else None

    def _close_object(self) -> list[Part] | None:
        indent = _indent(self._held)
        if indent == len(self._held):
            return None
        if self._held[indent] == "}":
            self._held = self._held[indent + 1 :]
            self._step = self._close_tag
        else:
            self._step, self._bare = self._seek, None
        return []

    def _close_tag(self) -> list[Part] | None:
        self._bare = None if self._tagged else _AFTER_CALL
        if self._tagged:
            rest = self._held[_indent(self._held) :]
            if rest != _CLOSE and _CLOSE.startswith(rest):
                return None
            if rest.startswith(_CLOSE):
                self._held = rest[len(_CLOSE) :]
        self._step = self._seek
        return []


class _Braces:
    """Finds the brace that closes an object, through strings and escapes, reading text once."""

    def __init__(self) -> None:
        self._depth = 0
        self._quoted = False
        self._next = 0

    def drop(self, length: int) -> None:
        """Expect a text without its first `length` characters; they may end in an escape."""
        self._next = max(0, self._next - length)

    def end(self, text: str, start: int) -> int | None:
        """Return the index after the closing brace of the object at `start`."""
        at = max(self._next, start)
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


def _parse(text: str) -> tuple[str, str] | None:
    """Return name and arguments of a call in any order of keys, if it is one."""
    try:
        call = from_json(text, allow_inf_nan=False)
    except ValueError:
        return None
    arguments = call.get("parameters", call.get("arguments"))
    name = call.get("name")
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)


def _may_be_key(key: str | None, *, closed: bool) -> bool:
    if key is None:
        return False
    return key in _KEYS if closed else any(name.startswith(key) for name in _KEYS)


def _end_of(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.match(text)
    return found.end() if found else 0


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip())


def _length_before(text: str, tag: str) -> int:
    """Return how much stands before white space and a beginning of `tag` at the text's end."""
    size = next((n for n in range(min(len(tag), len(text)), 0, -1) if text.endswith(tag[:n])), 0)
    return len(text[: len(text) - size].rstrip())
