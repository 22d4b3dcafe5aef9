"""OpenAI's error envelope, and the headers that an error calls for."""

from __future__ import annotations

import math
from typing import TypedDict

from serve_app.errors import BodyTimeout, EngineDead, InvalidApiKey, NotReady, ServeAppError

# Seconds after which a replica that died is usually replaced by a running one.
RETRY_UNAVAILABLE_S = 5


class ErrorBody(TypedDict):
    """The inner object of an envelope; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str


class Envelope(TypedDict):
    """`{"error": {...}}`, as a body or as the last event of a stream."""

    error: ErrorBody


def envelope(error: ServeAppError) -> Envelope:
    """Return what a client may read of an error: message, type, param, code."""
    return {
        "error": {
            "message": error.message,
            "type": error.error_type,
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: ServeAppError) -> dict[str, str]:
    """Return what an error calls for: `Retry-After` (whole seconds, >= 1), `Allow` and others."""
    headers = {}
    retry = error.details.get("retry_after_s")
    if retry is None and isinstance(error, NotReady | EngineDead):
        retry = RETRY_UNAVAILABLE_S
    if isinstance(retry, int | float):
        headers["retry-after"] = str(max(1, math.ceil(retry)))
    if allow := error.details.get("allow"):
        headers["allow"] = str(allow)
    if isinstance(error, InvalidApiKey):
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, BodyTimeout):  # the rest of the body may still come: it is no request
        headers["connection"] = "close"
    return headers
