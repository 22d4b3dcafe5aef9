"""The Hub's URL: which ones are accepted, and which leave this machine in clear text."""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

CLEAR_TEXT = (
    "endpoint is plain http, which would send the token of token_file in clear text; write it as "
    "https://, or set allow_http: true if the network to it is trusted"
)


def check_endpoint(value: str) -> str:
    """Return the Hub's URL without a trailing slash, or refuse it.

    Raises:
        ValueError: not a URL, or credentials in it.
    """
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("is not a URL; write it as https://host")
    if parts.username or parts.password:
        raise ValueError("must not carry credentials")
    return value.rstrip("/")


def is_plain_http(url: str) -> bool:
    """Return whether what is sent to a URL leaves this machine in clear text."""
    parts = urlsplit(url)
    return parts.scheme == "http" and not _is_loopback(parts.hostname or "")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
