"""Server-sent events: every event is one JSON object, written once.

A stream ends with a finish chunk for each choice, the usage chunk if it was asked for, and
`[DONE]`; or with one event that holds an error envelope, after which nothing comes. The
official client raises `APIError` on such an event.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

DONE = b"data: [DONE]\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold events back
}
# Many clients split lines at these as well (str.splitlines, httpx's iter_lines).
_LINE_BREAKS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


def dump(body: Mapping[str, object]) -> bytes:
    """Serialise an answer as compact UTF-8 JSON that holds no line break of any kind."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    if not text.isascii():
        text = text.translate(_LINE_BREAKS)
    return text.encode()


def event(body: Mapping[str, object]) -> bytes:
    """Write one event."""
    return b"data: " + dump(body) + b"\n\n"
