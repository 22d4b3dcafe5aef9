"""Requests and answers as plain data, between the routes and the sockets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

from scripts.local_hub.behaviours import Route
from scripts.local_hub.repos import RepoFile

Origin = Literal["hub", "cdn", "xet"]


class Silence(Enum):
    """Ways to fail a client below HTTP; `CUT` sends half of a file and closes."""

    HANG = "hang"
    NOT_HTTP = "not_http"
    CUT = "cut"


@dataclass(frozen=True, slots=True)
class Request:
    """One request, with its path already split.

    Args:
        method: upper case.
        target: path and query as the client sent them.
        headers: names in lower case.
        body: empty for most methods.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def path(self) -> str:
        """The decoded path, without the query."""
        return unquote(urlsplit(self.target).path)

    @property
    def segments(self) -> list[str]:
        """The path's parts, decoded one by one: a revision may hold an encoded slash."""
        return [unquote(part) for part in urlsplit(self.target).path.split("/")[1:]]

    @property
    def query(self) -> dict[str, list[str]]:
        """The query, every value a list."""
        return parse_qs(urlsplit(self.target).query, keep_blank_values=True)

    def flag(self, name: str) -> bool:
        """Return whether a boolean query parameter is set, as Python or JavaScript writes it."""
        return self.query.get(name, ["false"])[-1].lower() in {"true", "1"}

    @property
    def bearer(self) -> str | None:
        """The token; "" if the header holds no bearer token; None without the header."""
        value = self.headers.get("authorization")
        if value is None:
            return None
        scheme, _, token = value.partition(" ")
        return token.strip() if scheme.lower() == "bearer" else ""


@dataclass(frozen=True, slots=True)
class FilePart:
    """Bytes `start` to `stop` (exclusive) of a file, streamed."""

    file: RepoFile
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer; `silence` replaces it by a failure below HTTP."""

    status: int
    body: bytes | FilePart = b""
    headers: dict[str, str] = field(default_factory=dict)
    silence: Silence | None = None


@dataclass(slots=True)
class HubRequest:
    """One line of the Hub's log.

    It is appended when the request arrives and completed before the client can see the end of
    the answer, so a test that has its answer finds it here.

    Args:
        origin: which of the servers was asked.
        method: upper case.
        path: decoded, without the query (a signature is nobody's business).
        route: the kind of request.
        token: fingerprint of the bearer token sent; None if none was.
        range: the Range header.
        authorization_leaked: a Hub token arrived where it must not.
        at_s: seconds since the Hub started.
        status: 0 until the answer begins, and for ever if there is none.
        bytes_sent: body bytes handed to the socket.
    """

    origin: Origin
    method: str
    path: str
    route: Route
    token: str | None
    range: str | None
    authorization_leaked: bool
    at_s: float
    status: int = 0
    bytes_sent: int = 0


def file_answer(request: Request, file: RepoFile, headers: dict[str, str]) -> Answer:
    """Answer with a file, or with the one range of it that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = request.headers.get("range")
    if asked is None:
        return Answer(200, FilePart(file, 0, file.size), headers)
    span = parse_range(asked, file.size)
    if span is None:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{file.size}"})
    start, stop = span
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.size}"
    return Answer(206, FilePart(file, start, stop), headers)


def parse_range(value: str, size: int) -> tuple[int, int] | None:
    """Read a single byte range.

    Returns:
        First byte and the one after the last; None if it cannot be satisfied.
    """
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", value.strip())
    if match is None or not any(match.groups()):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start, stop = int(first), min(size, int(last) + 1 if last else size)
    return (start, stop) if start < stop else None
