"""One connection at a time to a stranger: the answer's headers come in time, or never.

The HTTP library limits each read from the socket, so a host that sends one byte a second holds
it for hours before the first header is whole. Here a timer cuts the socket. The bodies' limits
belong to those who read them: `client.py` for words, `transfer.py` for files.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import httpx2

from serve_app.access.hub.network import open_client

REDIRECTS = (301, 302, 303, 307, 308)
# ValueError and OSError: what sockets, certificates and header encoding raise below the client.
ERRORS = (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError, ValueError)
_PORTS = {"http": 80, "https": 443}

Credentials = Callable[[str], Mapping[str, str]]


def origin(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port; raises ValueError for a port that is no number."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or _PORTS.get(parts.scheme, 0)


def may_lead(url: str, target: str) -> bool:
    """Return whether an answer of one URL may send us to another one: never from https to http."""
    try:
        before, after = origin(url), origin(target)
    except ValueError:
        return False
    is_web = after[0] in _PORTS and bool(after[1])
    return is_web and not (before[0] == "https" and after[0] == "http")


class BoundedClient:
    """Sends requests one after the other; not for several threads at once.

    Args:
        credentials: headers for a URL, so that each goes only to the origin it belongs to.
        transport: replaces the network in tests.

    Raises:
        NoClient: this process's environment names a proxy or certificates that cannot be.
    """

    def __init__(
        self, credentials: Credentials, *, transport: httpx2.BaseTransport | None = None
    ) -> None:
        self._credentials = credentials
        self._client = open_client(transport)
        self._sockets: list[socket.socket] = []
        self._is_late = False

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    @contextmanager
    def stream(
        self,
        method: str,
        url: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
    ) -> Iterator[httpx2.Response]:
        """Send a request; redirects are not followed.

        Args:
            method: GET, HEAD, or POST with a content.
            url: absolute.
            timeout_s: limit until the answer's headers are here, then of each read.
            headers: of this request only, besides the URL's credentials.
            content: the body.

        Raises:
            ERRORS: no answer came in time.
        """
        asked = {"accept-encoding": "identity", **self._credentials(url), **(headers or {})}
        self._is_late = False
        timer = threading.Timer(timeout_s, self._cut)
        timer.daemon = True
        timer.start()
        try:
            with self._client.stream(
                method,
                url,
                headers=asked,
                content=content,
                timeout=timeout_s,
                extensions={"trace": self._trace},
            ) as response:
                timer.cancel()
                _refuse_compression(response)
                yield response
        except ERRORS:
            if self._is_late:
                raise httpx2.ReadTimeout("the answer's headers come too slowly") from None
            raise
        finally:
            timer.cancel()

    def _trace(self, event: str, facts: Mapping[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            found = facts["return_value"].get_extra_info("socket")
            self._sockets = [found, *self._sockets[:3]]  # of a proxy and of TLS within it

    def _cut(self) -> None:
        self._is_late = True
        for each in self._sockets:
            with suppress(OSError, ValueError):
                each.shutdown(socket.SHUT_RDWR)


def _refuse_compression(response: httpx2.Response) -> None:
    """A few KB can unpack to many GB before any limit is looked at, so nothing is unpacked."""
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise httpx2.DecodingError("compressed, although plain bytes were asked for")
