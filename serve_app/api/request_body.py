"""From headers and bytes to a JSON object: bounded in headers, depth, count and number size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

from pydantic_core import from_json
from starlette.datastructures import Headers

from serve_app.errors import (
    HeadersTooLarge,
    InvalidRequest,
    RequestTooLarge,
    UnsupportedMediaType,
)

TIMEOUT_HEADER = "x-request-timeout-seconds"
# Serve's proxy (2.60) obeys the same header: at the limit it answers 408 in plain text, or
# cuts a stream. Our answer has to leave before that, by the smaller of the two.
_EARLY_SHARE, _EARLY_S = 0.1, 0.2
# Uvicorn reads headers of any size with httptools, which is what Serve runs, and 64 KiB with
# h11: these are bounds of what is worked on, an outer proxy bounds what is read.
MAX_HEADERS, MAX_HEADER_BYTES = 100, 32_768
# The limit of pydantic's JSON reader (jiter), which takes one level more.
MAX_DEPTH = 200
# Far over what conversations and tools hold: 8,192 messages of two parts are 25,000.
MAX_CONTAINERS = 65_536
_BRACES = bytes.maketrans(b"[]", b"{}")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_JSON = re.compile(r"application/([\w.+-]+\+)?json", re.IGNORECASE)


def require_small_headers(raw: Sequence[tuple[bytes, bytes]]) -> None:
    """Refuse headers that are too many or too long to be worth looking at.

    Raises:
        HeadersTooLarge: over `MAX_HEADERS` of them, or over `MAX_HEADER_BYTES` in all.
    """
    if len(raw) > MAX_HEADERS or sum(map(len, chain.from_iterable(raw))) > MAX_HEADER_BYTES:
        raise HeadersTooLarge(
            f"at most {MAX_HEADERS} headers of {MAX_HEADER_BYTES} bytes in all are read"
        )


def require_json(headers: Headers) -> None:
    """Refuse a body that does not say it is JSON.

    A page in a browser may post `text/plain` anywhere without asking; `application/json`
    it may not, so this also keeps foreign pages out of a service on localhost.

    Raises:
        UnsupportedMediaType: another content-type or none, or a compressed body.
    """
    kind = headers.get("content-type", "").partition(";")[0].strip()
    if not _JSON.fullmatch(kind):
        raise UnsupportedMediaType("send the body with the header `content-type: application/json`")
    if headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedMediaType("send the body uncompressed, without `content-encoding`")


def time_limit(headers: Headers) -> float | None:
    """Return the seconds after which to give up, so that the client hears of it in time.

    Returns:
        A little less than the request's own limit; None if it has none, or one of zero or
        less, which is how Serve's proxy is set not to limit.

    Raises:
        InvalidRequest: not a finite number.
    """
    text = headers.get(TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not math.isfinite(seconds):
        raise InvalidRequest(f"`{TIMEOUT_HEADER}`: must be a number", param=TIMEOUT_HEADER)
    if seconds <= 0:
        return None
    return seconds - min(_EARLY_S, seconds * _EARLY_SHARE)


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse strict JSON: UTF-8, no NaN or Infinity, nesting and numbers of bounded size.

    Raises:
        InvalidRequest: says where, never what stands there.
        RequestTooLarge: more objects and lists than are read.
    """
    if not body.strip():
        raise InvalidRequest("the body is empty; send a JSON object")
    _refuse_bulk(body)
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        if "recursion" in str(error):
            raise _too_deep() from None
        raise InvalidRequest(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    return value


def _refuse_bulk(body: bytes) -> None:
    """Refuse more objects and lists than are read, before any of them is made.

    Making them is what a body can cost: each wakes Python's garbage collector, and one call of
    the parser cannot be interrupted (2 MB of `[[[[]]]],` take 0.4 s). What stands in quotes
    counts for nothing.
    """
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(plain.split(b'"')[::2]).translate(_BRACES, delete=_NO_BRACKETS)
    if b"{" * (MAX_DEPTH + 1) in brackets:
        raise _too_deep()
    if brackets.count(b"{") > MAX_CONTAINERS:
        raise RequestTooLarge(f"the body holds more than {MAX_CONTAINERS} objects and lists")


def _too_deep() -> InvalidRequest:
    return InvalidRequest(f"the body is nested too deeply; {MAX_DEPTH} levels are read")
