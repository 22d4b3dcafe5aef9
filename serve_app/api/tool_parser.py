"""Reads tool calls out of a model's text, as it comes, in the forms that models write them.

Only what names a known tool is a call; every other text stays content, also what only looks
like the beginning of a call. A call is emitted as soon as it is certain, and its arguments follow
piece by piece where its form allows that. How the text is cut into pieces never changes what is
read, and nothing of it is lost but the syntax around calls: tags, brackets, separators and the
white space that touches them.

A form of its own tag may stand anywhere. A bare one stands at the start, after another call, or
behind thoughts; after other words only where it can mean nothing else. The forms and tags are
those of `formats/table.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from serve_app.api.formats.buffer import (
    SPACE,
    Buffer,
    CallArguments,
    CallBegun,
    Content,
    Part,
    Read,
    Tools,
    Wait,
)
from serve_app.api.formats.function_tag import take_tag
from serve_app.api.formats.table import ANY_OPENING, FORMS, OPENINGS, TAGS, THOUGHTS_END, Tag

__all__ = ["CallArguments", "CallBegun", "Content", "Part", "ToolReader"]

THOUGHTS = "<think>"
SEPARATORS = SPACE + ";,"
# Before a bare call these say that it is a part of something else: code, JSON, a quotation.
_PART_OF_SOMETHING = re.compile(r'[\[{(,=`\'"\\]$|["\']:$')


class ToolReader:
    """Parts one completion's text into content and calls.

    Args:
        names: of the tools that may be called.
        parallel: more than one call may be made; otherwise further ones are left out.
        parameters: the JSON schema of each tool's arguments, as far as it is known.
        forced: the text can be nothing but calls; what is none of them is a call that was cut.
    """

    def __init__(
        self,
        names: Collection[str],
        *,
        parallel: bool = True,
        parameters: Mapping[str, Mapping[str, Any]] | None = None,
        forced: bool = False,
    ) -> None:
        self._tools = Tools(frozenset(names), parameters or {})
        self._parallel = parallel
        self._forced = forced
        self._buffer = Buffer()
        self._before = ""  # the last characters of what was emitted as content
        self._calls = 0
        self._parts = self._read()

    def read(self, text: str) -> list[Part]:
        """Return what is certain after more text."""
        self._buffer.text += text
        return list(self._ready())

    def end(self) -> list[Part]:
        """Return what is left when no more text comes; a call that broke off stays as emitted."""
        self._buffer.ended = True
        return list(self._ready())

    def _ready(self) -> Iterator[Part]:
        while (part := next(self._parts, None)) is not None:
            self._calls += isinstance(part, CallBegun)
            dropped = self._forced if isinstance(part, Content) else self._calls > 1
            if not dropped or (self._parallel and not isinstance(part, Content)):
                yield part

    def _read(self) -> Read[None]:
        buffer = self._buffer
        yield from self._thoughts()
        fresh = True  # a bare call may stand here
        while (yield from buffer.more(0)):
            if fresh and (yield from self._calls_here()):
                continue
            fresh = yield from self._content()

    def _thoughts(self) -> Read[None]:
        """Emit the thoughts that the text begins with; they may talk of calls."""
        buffer = self._buffer
        at = yield from buffer.skip(0)
        if not (yield from buffer.starts(THOUGHTS, at)):
            return
        while THOUGHTS_END not in buffer.text:
            yield from self._emit(len(buffer.text) - _beginning(buffer.text, (THOUGHTS_END,)))
            if not (yield from buffer.more(len(buffer.text))):
                return
        yield from self._emit(buffer.text.index(THOUGHTS_END) + len(THOUGHTS_END))

    def _calls_here(self) -> Read[bool]:
        """Read calls at this place, behind white space and separators of earlier ones."""
        buffer = self._buffer
        at = yield from buffer.skip(0, SEPARATORS if self._calls else SPACE)
        if not (yield from buffer.more(at)):
            if self._calls:
                buffer.take(at)  # nothing but syntax is left
            return bool(self._calls)
        buffer.short = False
        if (yield from self._tagged(at, fresh=True)) or (yield from self._some_form(at, sure=True)):
            return True
        if self._calls and ANY_OPENING.match(buffer.text, at):
            buffer.drop_beginning()
        return False

    def _content(self) -> Read[bool]:
        """Emit content up to the next calls and read those; False if a bare one may not follow."""
        buffer = self._buffer
        while not (found := ANY_OPENING.search(buffer.text)):
            sure = len(buffer.text) - _beginning(buffer.text, OPENINGS)
            yield from self._emit(len(buffer.text[:sure].rstrip(SPACE)))
            if not (yield from buffer.more(len(buffer.text))):
                yield from self._emit(len(buffer.text))
                return False
        yield from self._emit(len(buffer.text[: found.start()].rstrip(SPACE)))
        at = yield from buffer.skip(0)
        if (yield from buffer.starts(THOUGHTS_END, at)):
            yield from self._emit(at + len(THOUGHTS_END))
            return True
        if (yield from self._tagged(at, fresh=False)) or (yield from self._bare(at)):
            return True
        yield from self._emit(at + 1)
        return False

    def _bare(self, at: int) -> Read[bool]:
        """Read calls without a tag among other words, if they are no part of something else."""
        if _PART_OF_SOMETHING.search(self._before):
            return False
        return (yield from self._some_form(at, sure=False))

    def _tagged(self, at: int, *, fresh: bool) -> Read[bool]:
        """Read a tag and the calls in it."""
        for tag in TAGS:
            if (yield from self._buffer.starts(tag.opening, at)):
                return (yield from self._within(tag, at + len(tag.opening), fresh=fresh))
        return False

    def _within(self, tag: Tag, at: int, *, fresh: bool) -> Read[bool]:
        buffer = self._buffer
        at = yield from self._inside(tag, at)
        called = False
        while (yield from self._some_form(at, sure=tag.sure or fresh)):
            called = True
            at = yield from buffer.skip(0, SEPARATORS)
        if called and tag.closing:
            yield from take_tag(buffer, tag.closing, strays="}]")  # small models miscount braces
        return called

    def _inside(self, tag: Tag, at: int) -> Wait[int]:
        if tag.after:
            at = yield from self._buffer.skip(at, tag.after)
        return (yield from self._buffer.skip(at))

    def _some_form(self, at: int, *, sure: bool) -> Read[bool]:
        for form in FORMS:
            if (yield from form.read(self._buffer, at, self._tools, sure=sure)):
                self._before = ""
                return True
        return False

    def _emit(self, length: int) -> Read[None]:
        if text := self._buffer.take(length):
            self._before = (self._before + text)[-2:]
            yield Content(text)


def _beginning(text: str, marks: Collection[str]) -> int:
    """Return how many of the last characters may be the beginning of a mark."""
    longest = max(map(len, marks)) - 1
    ends = (size for size in range(min(longest, len(text)), 0, -1))
    return next((n for n in ends if any(mark.startswith(text[-n:]) for mark in marks)), 0)
