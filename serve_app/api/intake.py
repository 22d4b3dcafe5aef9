"""Reading bodies: so many at a time, so many bytes of them, and each in a bounded time.

A body that comes slowly holds a place here and none of a running request, so that clients who
send a byte a second cannot close the service. When all places are taken the body that is on its
way longest gives way: a real one is here within milliseconds, and the slow ones push out each
other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive

from serve_app.errors import BodyTimeout, Overloaded, RequestCancelled, RequestTooLarge

MIN_BYTES_PER_S = 16_384  # what has come buys a body more time at this rate
PLACES = 1024  # over what engines take on; a place costs no more than its connection
YOUNG_S = 1.0  # a body is not pushed out before this age
HELD_BODIES = 64  # of the largest size: what all bodies together may hold in memory


@dataclass(eq=False, slots=True)
class _Arrival:
    """One body on its way."""

    limit: asyncio.Timeout
    started: float
    size: int = 0


class Intake:
    """The bodies of one application that are on their way, or not worked on yet.

    Args:
        max_bytes: largest body.
        timeout_s: time for a body, and one second more for each `MIN_BYTES_PER_S` that came.
        places: bodies on their way at a time.
    """

    def __init__(self, *, max_bytes: int, timeout_s: float, places: int = PLACES) -> None:
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._places = places
        self._arriving: dict[_Arrival, None] = {}  # a set in order: the oldest first
        self._held_bytes = 0

    @asynccontextmanager
    async def body(self, receive: Receive, headers: Headers) -> AsyncIterator[bytes]:
        """Read a request's body; its bytes count as held until the context is left.

        Raises:
            RequestTooLarge: announced or actual size over the limit; read no further.
            BodyTimeout: it did not come in time, or was the oldest when places were needed.
            Overloaded: no place, and nobody who holds one for long.
            RequestCancelled: the client went away before the end.
        """
        length = headers.get("content-length", "")
        # Cut to 20 digits: of thousands `int` refuses to make a number.
        if length.isascii() and length.isdigit() and int(length[:20]) > self._max_bytes:
            raise self._too_large()
        if len(self._arriving) >= self._places:
            self._push_out(YOUNG_S)
        now = asyncio.get_running_loop().time()
        arrival = _Arrival(asyncio.timeout_at(now + self._timeout_s), now)
        try:
            try:
                async with arrival.limit:
                    self._arriving[arrival] = None
                    raw = await self._read(receive, arrival)
            except TimeoutError:
                if not arrival.limit.expired():
                    raise
                raise BodyTimeout(
                    f"the body came too slowly; it may take {self._timeout_s:g} s, or less while "
                    "many others come"
                ) from None
            finally:
                # It may be pushed out already.
                self._arriving.pop(arrival, None)
            yield raw
        finally:
            self._held_bytes -= arrival.size

    async def _read(self, receive: Receive, arrival: _Arrival) -> bytes:
        chunks: list[bytes] = []
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise RequestCancelled("the client went away while it sent the body")
            chunks.append(message.get("body", b""))
            self._hold(arrival, len(chunks[-1]))
            more = message.get("more_body", False)
        return b"".join(chunks)

    def _hold(self, arrival: _Arrival, size: int) -> None:
        arrival.size += size
        self._held_bytes += size
        if arrival.size > self._max_bytes:
            raise self._too_large()
        if arrival in self._arriving:  # it was not pushed out meanwhile
            seconds = self._timeout_s + arrival.size / MIN_BYTES_PER_S
            arrival.limit.reschedule(arrival.started + seconds)
        while self._held_bytes > HELD_BODIES * self._max_bytes:
            self._push_out(0, but=arrival)

    def _push_out(self, age_s: float, but: _Arrival | None = None) -> None:
        """End the oldest body on its way, if it is old enough."""
        now = asyncio.get_running_loop().time()
        oldest = next((each for each in self._arriving if each is not but), None)
        if oldest is None or now - oldest.started < age_s:
            raise Overloaded("too many bodies are sent at once; retry later", retry_after_s=1)
        del self._arriving[oldest]
        self._held_bytes -= oldest.size
        # Its `body` gives back what it holds when it ends, which by then is nothing.
        oldest.size = 0
        if not oldest.limit.expired():  # else it is about to end by itself
            oldest.limit.reschedule(now)

    def _too_large(self) -> RequestTooLarge:
        return RequestTooLarge(
            f"the body is larger than {self._max_bytes} bytes", max_bytes=self._max_bytes
        )
