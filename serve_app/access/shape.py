"""What can be seen of a token's value before it is sent: quotes, lines, headers, base64."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable

NO_VALUE = frozenset({"none", "null", "nil", "undefined", "false", "changeme"})


def _is_encoded(value: str) -> bool:
    """Return whether a value is a token in base64, once or several times over."""
    for _ in range(4):
        try:
            decoded = base64.b64decode(value + "=" * (-len(value) % 4), validate=True)
            value = decoded.decode().strip()
        except ValueError:
            return False
        if value.startswith(("hf_", "api_org_")):
            return True
    return False


_QUOTES = "\"'`“”‘’"
_SHAPES: tuple[tuple[Callable[[str], object], str], ...] = (
    (lambda value: not value, "is empty"),
    (lambda value: "\n" in value or "\r" in value, "holds more than one line"),
    (lambda value: value[0] in _QUOTES or value[-1] in _QUOTES, "has quotes around it"),
    (lambda value: value.lower() in NO_VALUE, "is a word that means nothing was filled in"),
    (
        lambda value: re.match(r"(?i)(bearer|authorization:|token)\s", value),
        "starts with words of a header; only the token itself belongs there",
    ),
    (
        lambda value: re.match(r"(?i)(export\s+)?[a-z_]+\s*=", value),
        "is a whole assignment; only what follows the `=` belongs there",
    ),
    (lambda value: re.match(r"\$|<.*>$|\{\{", value), "is a placeholder that was not filled in"),
    (
        _is_encoded,
        "is base64 of a token: the Secret was encoded twice (its `data:` is base64 already; "
        "`stringData:` takes the token itself)",
    ),
    (lambda value: not value.isascii(), "has characters that no token has (not ASCII)"),
    (lambda value: re.search(r"[\s\x00-\x1f\x7f]", value), "has spaces or control characters"),
)


def shape_fault(value: str) -> str | None:
    """Say what is wrong with a value to look at, without repeating it; None if nothing is.

    Args:
        value: already without the white space around it, as huggingface_hub sends it.
    """
    return next((complaint for matches, complaint in _SHAPES if matches(value)), None)
