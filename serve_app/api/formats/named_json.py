"""Calls as a name with its arguments behind it: `f{…}`, `f[ARGS]{…}`, `f[CALL_ID]…[ARGS]{…}`."""

from __future__ import annotations

from serve_app.api.formats.tape import CallBegun, Read, Tape, Tools, Wait

ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"
_ID_CHARS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"


class NamedJson:
    """One such call."""

    opening = ""

    def read(self, tape: Tape, at: int, tools: Tools, *, sure: bool) -> Read[bool]:
        """See `table.Form`."""
        name = yield from tape.one_of(tools.names, at)
        if not sure or not name:
            return False
        at = yield from _arguments_at(tape, at + len(name))
        if (yield from tape.char(at)) != "{":
            return False
        inner = yield from tape.skip(at + 1)
        if (yield from tape.char(inner)) not in ('"', "}"):
            return False
        tape.take(at)
        yield CallBegun(name)
        yield from tape.tell_object()
        return True


def _arguments_at(tape: Tape, at: int) -> Wait[int]:
    if (yield from tape.starts(CALL_ID, at)):
        at = yield from tape.skip(at + len(CALL_ID), _ID_CHARS)
    if (yield from tape.starts(ARGUMENTS, at)):
        at += len(ARGUMENTS)
    return (yield from tape.skip(at))
