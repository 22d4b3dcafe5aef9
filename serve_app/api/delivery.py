"""Delivers an answer to its client: as one object, or as a stream of events.

A stream that has nothing to say yet says so: after some seconds it begins, with a comment, and
repeats that while it is silent, so that no proxy and no client takes it for dead. By then all
checks of the request have been made; what fails later is its last event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from starlette.types import Send

from serve_app.api import sse
from serve_app.api.choices import Choices, Piece, join
from serve_app.api.convert import Plan
from serve_app.api.error_body import envelope
from serve_app.api.offload import Offload
from serve_app.api.request_record import Trace
from serve_app.api.response_types import ChunkWriter, usage_body
from serve_app.errors import ServeAppError
from serve_app.protocol import Usage

T = TypeVar("T")


class AnswerWriter(Protocol):
    """Writes the answer of one API request."""

    def full_body(self, pieces: Sequence[Piece], usage: Usage) -> Mapping[str, object]:
        """Return the complete answer: one piece for each choice, by index."""
        ...

    def events(self, pieces: Sequence[Piece], usage: Usage) -> Iterator[bytes]:
        """Return the events of a stream for more pieces."""
        ...

    def end(self, usage: Usage) -> bytes:
        """Return what a stream ends with when all went well."""
        ...

    def failed(self, error: ServeAppError) -> bytes:
        """Return what a stream ends with instead."""
        ...


async def collect(
    writer: AnswerWriter, choices: Choices, trace: Trace, send: Send, offload: Offload
) -> None:
    """Send the answer as one object, when it is complete."""
    arrived: dict[int, list[Piece]] = {}
    while pieces := await choices.next():
        trace.delta_arrived(choices.usage, choices.timing, choices.count)
        for piece in pieces:
            arrived.setdefault(piece.index, []).append(piece)
    # By its weight: a large answer's JSON would stop the event loop, and with it every stream.
    body = await offload.run(choices.weight, partial(_complete, writer, arrived, choices.usage))
    # One label of a metric for a request of several choices: the first one's.
    trace.finish_reason = arrived[0][-1].finish_reason
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    await _start(send, {**headers, "server-timing": trace.server_timing})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _complete(writer: AnswerWriter, arrived: Mapping[int, list[Piece]], usage: Usage) -> bytes:
    return sse.dump_large(
        writer.full_body([join(arrived[index]) for index in sorted(arrived)], usage)
    )


class EventStream:
    """One streamed answer.

    Args:
        trace: of its request.
        send: to its client.
        keep_alive_s: how long it may be silent; None is for ever.
        offload: does what takes long.
    """

    def __init__(
        self, trace: Trace, send: Send, *, keep_alive_s: float | None, offload: Offload
    ) -> None:
        self._trace = trace
        self._send = send
        self._keep_alive_s = keep_alive_s
        self._offload = offload
        self._begun = False

    async def wait_for(self, work: Awaitable[T]) -> T:
        """Return what `work` returns, and stay alive meanwhile."""
        task = asyncio.ensure_future(work)
        try:
            # `wait` and not `wait_for`, which would cancel the work at the first comment.
            while not (await asyncio.wait((task,), timeout=self._keep_alive_s))[0]:
                await self._write(sse.KEEP_ALIVE)
        finally:
            task.cancel()
        return await task

    async def deliver(self, writer: AnswerWriter, choices: Choices) -> None:
        """Send the events of all choices, from the first to the last."""
        while (pieces := await choices.next(self._keep_alive_s)) != []:
            if pieces is None:
                await self._write(sse.KEEP_ALIVE)
                continue
            self._trace.delta_arrived(choices.usage, choices.timing, choices.count)
            for piece in pieces:
                if piece.index == 0 and piece.finish_reason is not None:
                    self._trace.finish_reason = piece.finish_reason
            weight = sum(piece.weight for piece in pieces)
            body = await self._offload.run(
                weight, partial(_joined, writer.events(pieces, choices.usage))
            )
            await self._write(body)
        self._trace.delta_arrived(choices.usage, choices.timing, choices.count)
        await self._write(writer.end(choices.usage), more=False)

    async def _write(self, body: bytes, *, more: bool = True) -> None:
        # Not before there is something to send: an error before that still gets its own status.
        if not self._begun:
            self._begun = True
            await _start(self._send, {**sse.HEADERS, "server-timing": self._trace.server_timing})
        if body or not more:
            await self._send({"type": "http.response.body", "body": body, "more_body": more})


def _joined(events: Iterator[bytes]) -> bytes:
    return b"".join(events)


def plain_failure(error: ServeAppError) -> bytes:
    """Return an error as the last event of a stream, before there is a writer to write it."""
    return sse.event(envelope(error))


class Chunks:
    """See `AnswerWriter`; an event is a chunk, with the usage that was asked for."""

    def __init__(self, writer: ChunkWriter, plan: Plan) -> None:
        self._writer = writer
        self._plan = plan

    def full_body(self, pieces: Sequence[Piece], usage: Usage) -> Mapping[str, object]:
        """Return the complete answer."""
        return self._writer.full_body(pieces, usage)

    def events(self, pieces: Sequence[Piece], usage: Usage) -> Iterator[bytes]:
        """Return a chunk for each of the changes, as an event."""
        for piece in pieces:
            for chunk in self._writer.chunks(piece):
                yield self._event(chunk, usage)

    def end(self, usage: Usage) -> bytes:
        """Return the usage, if it was asked for, and the word for the end."""
        if not self._plan.include_usage:
            return sse.DONE
        return sse.event({**self._writer.end(), "usage": usage_body(usage)}) + sse.DONE

    def failed(self, error: ServeAppError) -> bytes:
        """Return the envelope as an event."""
        return plain_failure(error)

    def _event(self, chunk: dict[str, Any], usage: Usage) -> bytes:
        if self._plan.continuous_usage:
            chunk["usage"] = usage_body(usage)
        elif self._plan.include_usage:
            chunk["usage"] = None
        return sse.event(chunk)


async def _start(send: Send, headers: dict[str, str]) -> None:
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})
