"""What a secret looks like, and how text is cleaned of it before anybody sees it."""

from __future__ import annotations

import re
import traceback
from typing import Any

# Hub tokens start with hf_ (users) or api_org_ (organisations); 20 is far below their length. What
# comes of an exchange (hf_oauth_, hf_jwt_) and identity tokens (JWT) have dots and hyphens too.
SECRET = re.compile(
    r"\b(?:hf_(?:jwt|oauth)_[A-Za-z0-9_.=-]{20,}|(?:hf|api_org)_[A-Za-z0-9_]{20,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*)"
)
MESSAGE_CHARS = 400

_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}")
_REDACTED = "[secret]"


def sanitise(text: str, *, limit: int = MESSAGE_CHARS) -> str:
    """Make foreign words safe to show: one line, no control characters, no secret, bounded."""
    # White space first becomes a space and the rest nothing, which may join a secret's halves.
    clean = "".join(char for char in re.sub(r"\s", " ", text) if char.isprintable())
    clean = SECRET.sub(_REDACTED, re.sub(r" +", " ", clean)).strip()
    return clean if len(clean) <= limit else clean[: limit - 3].rstrip() + "..."


def place_of(fault: BaseException) -> str:
    """Return where a fault was raised; unlike its text, which may quote anything, safe to log."""
    frames = traceback.extract_tb(fault.__traceback__)[-3:]
    return " < ".join(f"{frame.filename}:{frame.lineno}" for frame in reversed(frames))


def scrub(value: Any) -> Any:
    """Replace whatever looks like a Hub token or a bearer credential, in nested data too."""
    if isinstance(value, str):
        return _BEARER.sub(rf"\1{_REDACTED}", SECRET.sub(_REDACTED, value))
    if isinstance(value, dict):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return type(value)(scrub(item) for item in value)
    if isinstance(value, bytes):
        return scrub(value.decode("utf-8", "replace"))
    return value if isinstance(value, int | float | bool | None) else scrub(str(value))
