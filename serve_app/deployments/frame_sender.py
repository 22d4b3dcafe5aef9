"""The replica's end of the connections on which deltas go to the ingresses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import cast

import structlog

from serve_app.cluster.network import client_context
from serve_app.deployments import frames
from serve_app.deployments.frames import Failure, Frame, ReplyTo
from serve_app.errors import EngineDead, ServeAppError
from serve_app.protocol import TokenDelta

log = structlog.get_logger()

CONNECT_TIMEOUT_S = 1.0  # nodes of one network; a firewall that drops must not cost more
RETRY_S = 30.0  # after a failure; until then requests are answered through Ray's streams
FULL_BYTES = 1 << 20  # on their way to one ingress, after which the streams wait


class FrameSender:
    """A connection to each ingress that asks, made when it first does.

    Args:
        heartbeat_s: seconds after which a frame goes out even if there is nothing to say.
    """

    def __init__(self, heartbeat_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._connections: dict[tuple[str, int], asyncio.Task[Connection | None]] = {}
        self._watching: set[asyncio.Task[None]] = set()

    async def connection(self, reply_to: ReplyTo) -> Connection | None:
        """Return the connection to an ingress, or None where it cannot be reached."""
        address = (reply_to.host, reply_to.port)
        connecting = self._connections.get(address)
        if connecting is None:
            connecting = asyncio.create_task(self._connect(reply_to))
            self._connections[address] = connecting
        connection = await asyncio.shield(connecting)  # others wait for it as well
        return None if connection is None or connection.lost else connection

    def close(self) -> None:
        """End all connections."""
        for task in (*self._connections.values(), *self._watching):
            task.cancel()  # who watches a connection closes it

    async def _connect(self, reply_to: ReplyTo) -> Connection | None:
        address = (reply_to.host, reply_to.port)
        writer = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(*address, ssl=client_context())
                writer.write(frames.hello(reply_to.secret))
                # A proxy between may accept whatever comes and cut it off then, and so does an
                # ingress that has its fill of strangers: nothing goes this way before its welcome.
                await reader.readexactly(len(frames.WELCOME))
        except (OSError, KeyError, TimeoutError, EOFError) as error:
            if writer is not None:
                writer.close()
            cause = f"{type(error).__name__}: {error}"
            log.warning("frames.unreachable", host=reply_to.host, port=reply_to.port, cause=cause)
            asyncio.get_running_loop().call_later(RETRY_S, self._connections.pop, address, None)
            return None
        connection = Connection(writer, self._heartbeat_s)
        watching = asyncio.create_task(connection.watch(reader))
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)
        watching.add_done_callback(lambda _: self._connections.pop(address, None))
        return connection


class Connection:
    """The connection to one ingress.

    What is put in during one turn of the event loop leaves as one frame, so that a step of the
    engine, which wakes all its readers at once, is one frame.

    Args:
        writer: to the ingress.
        heartbeat_s: see `FrameSender`.
    """

    def __init__(self, writer: asyncio.StreamWriter, heartbeat_s: float) -> None:
        self.lost = False
        self._writer = writer
        self._heartbeat_s = heartbeat_s
        self._frame: Frame | None = None
        self._draining = asyncio.Lock()
        self._carrying: set[asyncio.Task[object]] = set()
        self._loop = asyncio.get_running_loop()
        writer.transport.set_write_buffer_limits(high=FULL_BYTES)
        self._beat = self._loop.call_later(heartbeat_s, self._flush)

    async def carry(self, key: int, deltas: AsyncGenerator[TokenDelta, None]) -> None:
        """Send the deltas of one request, and its error if it ends with one of ours.

        Args:
            key: of the request in that ingress.
            deltas: is closed in the end.

        Raises:
            EngineDead: the connection was lost, so nobody waits for them.
        """
        task = cast("asyncio.Task[object]", asyncio.current_task())
        self._carrying.add(task)
        try:
            self._next_frame().taken.append(key)
            async with aclosing(deltas):
                async for delta in deltas:
                    self._next_frame().deltas.append((key, delta))
                    await self._room()
        except ServeAppError as error:
            self._next_frame().failures.append((key, Failure.of(error)))
        except asyncio.CancelledError:
            if not self.lost:
                raise
            task.uncancel()
            raise EngineDead("the connection to the ingress was lost", cause="frames") from None
        finally:
            self._carrying.discard(task)

    async def watch(self, reader: asyncio.StreamReader) -> None:
        """Wait until the connection has ended; what it carried then ends, as nobody reads it."""
        try:
            await reader.read(1)  # an ingress says nothing more
        except OSError:
            pass
        finally:
            self.close()
            for task in self._carrying:
                task.cancel()

    def close(self) -> None:
        """End the connection, after what is on its way."""
        if not self.lost:
            self._flush()
        self.lost = True
        self._beat.cancel()
        self._writer.close()

    async def _room(self) -> None:
        """Wait while too much is on its way; the engine's stream gathers deltas meanwhile."""
        if self._writer.transport.get_write_buffer_size() > FULL_BYTES:
            async with self._draining:  # a writer can be drained by one at a time
                with suppress(OSError):  # `watch` notices
                    await self._writer.drain()

    def _next_frame(self) -> Frame:
        if self._frame is None:
            self._frame = Frame()
            self._loop.call_soon(self._flush)
        return self._frame

    def _flush(self) -> None:
        """Write what has gathered; nothing at all is a heartbeat."""
        frame, self._frame = self._frame or Frame(), None
        if self.lost:
            return
        self._writer.write(frames.encode(frame))
        self._beat.cancel()
        self._beat = self._loop.call_later(self._heartbeat_s, self._flush)
