"""Which names a request may call this service by.

A page of any site can have its own name lead to 127.0.0.1 and then speak to a service there as
if it were its own (DNS rebinding). The browser still says that name in the Host header, so a
service that no key protects, asked over loopback, answers to this machine's own names alone.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import HostNotAllowed

# Nobody can register these; containers call their host by such names.
_PRIVATE = (".localhost", ".local", ".internal")
# What proxies add. A page may add most of them as well: see `_is_forwarded`.
_FORWARDED = ("forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip")


class KnownHost:
    """Refuses a request that names another machine.

    Args:
        app: everything inside.
        allowed: names that pass beside this machine's own and all addresses, `*.` for
            subdomains; None lets every name pass that does not come over loopback.
    """

    def __init__(self, app: ASGIApp, allowed: Sequence[str] | None) -> None:
        self._app = app
        self._allowed = None if allowed is None else tuple(name.lower() for name in allowed)
        self._own = {"localhost", socket.gethostname().lower()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse.

        Raises:
            HostNotAllowed: the Host header names another machine.
        """
        if scope["type"] == "http" and not self._knows(scope):
            raise HostNotAllowed(
                "the Host header names another machine; if this service is known by that name, "
                "add it to `api.allowed_hosts` in its config"
            )
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        headers = Headers(scope=scope)
        hosts = [split_host(value) for value in headers.getlist("host") if value.strip()]
        if self._allowed is None and not _over_loopback(scope):
            return True
        return all(
            self._is_own(name)
            or any(_matches(name, pattern) for pattern in self._allowed or ())
            or (self._allowed is None and _is_forwarded(scope, headers, port))
            for name, port in hosts
        )

    def _is_own(self, name: str) -> bool:
        return name in self._own or name.endswith(_PRIVATE) or _address(name) is not None


def split_host(value: str) -> tuple[str, int | None]:
    """Return the name of a Host header, in lower case and without brackets, and its port."""
    name, port = value.strip().lower(), ""
    if name.startswith("["):
        name, _, port = name[1:].partition("]")
        port = port.removeprefix(":")
    elif name.count(":") == 1:
        name, _, port = name.partition(":")
    return name.rstrip("."), int(port) if port.isascii() and port.isdigit() else None


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("*."):
        return name.endswith(pattern[1:])
    return name == pattern


def _is_forwarded(scope: Scope, headers: Headers, port: int | None) -> bool:
    """Return whether a proxy on this machine passed the request on, with the name it was asked by.

    It says so in a header; and its port is not ours, while a page that came here by rebinding
    has our port in its own address.
    """
    _, here = scope.get("server") or (None, None)
    return (port or 80) != here and any(name in headers for name in _FORWARDED)


def _over_loopback(scope: Scope) -> bool:
    host, _ = scope.get("server") or ("", None)
    address = _address(str(host))
    if address is None:
        return host == "localhost"
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or bool(mapped and mapped.is_loopback)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
