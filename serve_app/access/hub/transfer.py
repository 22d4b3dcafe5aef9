"""One file's bytes from the Hub to a stream: resumed, never more than announced, never too slow."""

from __future__ import annotations

import re
from typing import BinaryIO
from urllib.parse import urljoin

import httpx2

from serve_app.access.hub.bounded_client import REDIRECTS, BoundedClient, may_lead
from serve_app.access.hub.classify import Answer, Step
from serve_app.access.hub.network import host_of
from serve_app.access.hub.pace import Pace

HOPS = 5  # the Hub, a renamed repository, a cache, a CDN that hands over
PIECE_BYTES = 8 << 30  # of one request: CDNs refuse to send tens of GB at once
WORDS_BYTES = 64 << 10  # of an answer that is read for its words only
HEADERS_S = 30.0


class Refused(Exception):
    """The answer is not the file."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(str(answer.status))
        self.answer = answer


class Overrun(Exception):
    """More bytes, or others, than were announced and asked for; says which host sent them."""


def append(
    client: BoundedClient,
    url: str,
    stream: BinaryIO,
    size: int,
    pace: Pace,
    *,
    stop: int | None = None,
) -> None:
    """Write the rest of a file behind what a stream has of it.

    Args:
        client: sends the requests; its credentials go to the URLs they belong to.
        url: of the whole file.
        stream: at its end; truncated if the host sends the file from its beginning.
        size: announced bytes of the whole file, more than the stream has.
        pace: raises `Stalled` if it takes too long.
        stop: the byte before which to end; None is the size.

    Raises:
        Refused: another answer came.
        Overrun: the host sends what was not announced.
        ERRORS: the connection failed or broke off.
    """
    last = size if stop is None else stop
    while (have := stream.tell()) < last:
        _piece(client, url, stream, min(last, have + PIECE_BYTES), size, pace)


def _piece(
    client: BoundedClient, url: str, stream: BinaryIO, stop: int, size: int, pace: Pace
) -> None:
    have = stream.tell()
    end = "" if stop == size else str(stop - 1)
    # A whole file is asked for plainly: some mirrors do not know ranges.
    wanted = {"range": f"bytes={have}-{end}"} if have or end else {}
    timeout_s = min(HEADERS_S, pace.stall_s)
    for _ in range(HOPS + 1):
        with client.stream("GET", url, timeout_s=timeout_s, headers=wanted) as response:
            if response.status_code in REDIRECTS and (to := response.headers.get("location")):
                target = urljoin(url, to)
                if not may_lead(url, target):
                    raise Refused(_answer(response, url, pace))
                url = target
                continue
            if response.status_code not in (200, 206):
                raise Refused(_answer(response, url, pace))
            if response.status_code == 200 and have:  # it sends all of it once more
                stream.seek(0)
                stream.truncate()
            _copy(response, url, stream, stop if response.status_code == 206 else size, size, pace)
            return
    raise httpx2.TooManyRedirects(f"{host_of(url)} redirects in a circle")


def _copy(
    response: httpx2.Response, url: str, stream: BinaryIO, stop: int, size: int, pace: Pace
) -> None:
    have = stream.tell()
    _refuse_other_bytes(response, url, have, stop, size)
    for chunk in response.iter_bytes():
        have += len(chunk)
        # Before it is written: a host that never ends must not fill the disk.
        if have > stop:
            raise Overrun(f"{host_of(url)} sends more than the {stop:,} bytes that were announced")
        stream.write(chunk)
        pace.moved(len(chunk))
    # A clean end of the connection is no end of the file; the next try goes on from here.
    if have < stop:
        raise httpx2.RemoteProtocolError("the bytes broke off")


def _refuse_other_bytes(
    response: httpx2.Response, url: str, have: int, stop: int, size: int
) -> None:
    """Compare what the headers announce with what was asked for, before a byte is read."""
    length = response.headers.get("content-length", "")
    if length.isdecimal() and have + int(length) > stop:
        total = f"{have + int(length):,}"
        raise Overrun(
            f"{host_of(url)} announces {total} bytes of a file that is listed with {size:,}"
        )
    if response.status_code != 206:
        return
    span = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("content-range", ""))
    if span is None or int(span[1]) != have or (span[3] != "*" and int(span[3]) != size):
        raise Overrun(f"{host_of(url)} sends another part than was asked for")


def _answer(response: httpx2.Response, url: str, pace: Pace) -> Answer:
    body = b""
    for chunk in response.iter_bytes():
        body += chunk
        # A refusal that drips its words would otherwise hold the fetch up for ever.
        pace.moved(0)
        if len(body) >= WORDS_BYTES:
            break
    headers = dict(response.headers)
    return Answer(Step.WEIGHTS, response.status_code, headers, body[:WORDS_BYTES], url)
