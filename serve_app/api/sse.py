"""Server-sent events: every event is one JSON object, written once.

A stream ends with a finish chunk for each choice, the usage chunk if it was asked for, and
`[DONE]`; or with one event that holds an error envelope, after which nothing comes. The
official client raises `APIError` on such an event.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which no client hands on
# Many clients split lines at these as well (str.splitlines, httpx's iter_lines).
_LINE_BREAKS = {char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}
# A list longer than this is written in slices: one call of the encoder cannot be interrupted.
_SLICE = 64


def dump(body: Mapping[str, object]) -> bytes:
    """Serialise an answer as compact UTF-8 JSON that holds no line break of any kind."""
    return _dump(body)


def dump_large(body: Mapping[str, object]) -> bytes:
    """Do the same in a thread, in steps that let the event loop run."""
    return b"".join(_slices(body))


def _slices(value: object, depth: int = 0) -> Iterator[bytes]:
    if isinstance(value, Mapping) and value:
        before = b"{"
        for key, item in value.items():
            yield before + _dump(key) + b":"
            yield from _slices(item, depth + 1)
            before = b","
        yield b"}"
    elif isinstance(value, list) and len(value) > _SLICE and depth > 1:  # no list of choices
        before = b"["
        for start in range(0, len(value), _SLICE):
            yield before + _dump(value[start : start + _SLICE])[1:-1]
            before = b","
        yield b"]"
    elif isinstance(value, list) and value:
        before = b"["
        for item in value:
            yield before
            yield from _slices(item, depth + 1)
            before = b","
        yield b"]"
    else:
        yield _dump(value)


def _dump(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if not text.isascii():
        for char, escape in _LINE_BREAKS.items():
            text = text.replace(char, escape)
    # Half a surrogate pair, which a chat template can write, becomes "?".
    return text.encode(errors="replace")


def event(body: Mapping[str, object]) -> bytes:
    """Write one event."""
    return b"data: " + dump(body) + b"\n\n"
