"""Calls as a name with its arguments behind it: `f{…}`, `f[ARGS]{…}`, `f[CALL_ID]…[ARGS]{…}`."""

from __future__ import annotations

from serve_app.api.formats.buffer import Buffer, CallBegun, Read, Tools, Wait

ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"
_ID_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"


class NamedJson:
    """One such call."""

    opening = ""

    def read(self, buffer: Buffer, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """See `table.Form`."""
        name = yield from buffer.one_of(tools.names, at)
        if not sure or not name:
            return False
        at = yield from _arguments_at(buffer, at + len(name))
        if (yield from buffer.char(at)) != "{":
            return False
        inner = yield from buffer.skip(at + 1)
        if (yield from buffer.char(inner)) not in ('"', "}"):
            return False
        buffer.take(at)
        yield CallBegun(name)
        yield from buffer.emit_object()
        return True


def _arguments_at(buffer: Buffer, at: int) -> Wait[int]:
    if (yield from buffer.starts(CALL_ID, at)):
        at = yield from buffer.skip(at + len(CALL_ID), _ID_CHARS)
    if (yield from buffer.starts(ARGUMENTS, at)):
        at += len(ARGUMENTS)
    return (yield from buffer.skip(at))
