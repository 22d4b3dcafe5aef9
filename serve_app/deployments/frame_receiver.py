"""The ingress' end of the connections on which replicas send deltas."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import secrets
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import structlog

from serve_app.cluster.network import server_context
from serve_app.deployments import frames
from serve_app.deployments.frames import ReplyTo
from serve_app.errors import EngineDead, ServeAppError
from serve_app.protocol import TokenDelta

log = structlog.get_logger()

HELLO_TIMEOUT_S = 5.0
LARGE_BYTES = 1 << 16  # a millisecond or two to read
MAX_STRANGERS = 64  # connections that have not said the secret yet

NO_CONNECTION = "connection lost"  # the cause of an `EngineDead`
LOST = "the replica was lost while it answered; retry the request"

Item: TypeAlias = TokenDelta | ServeAppError


class Inbox:
    """What comes for one request, from a connection or from Ray's own stream.

    Args:
        reply_to: where a replica sends it; None where this ingress could not listen.
    """

    def __init__(self, reply_to: ReplyTo | None) -> None:
        self.reply_to = reply_to
        self.taken = False  # whether a replica has it
        self._loop = asyncio.get_running_loop()
        self.closed = False
        self._alive_at = time.monotonic()
        self._items: deque[Item] = deque()
        self._arrived: asyncio.Future[None] | None = None
        self.connection: _Connection | None = None

    @property
    def alive_at(self) -> float:
        """When its replica last gave a sign of life, in monotonic seconds."""
        shared = self.connection.alive_at if self.connection else self._alive_at
        return max(shared, self._alive_at)

    def sign_of_life(self, connection: _Connection | None = None) -> None:
        """Note that a replica has the request."""
        self.taken = True
        self.connection = connection or self.connection
        self._alive_at = time.monotonic()
        self._wake()

    def put(self, item: Item) -> None:
        """Add a delta, or the error that ends the request."""
        self._items.append(item)
        self.taken = True
        self._wake()

    async def get(self, timeout_s: float) -> Item | None:
        """Return the next item; None if `timeout_s` passed or a sign of life came before it."""
        if not self._items:
            self._arrived = self._loop.create_future()
            timer = self._loop.call_later(timeout_s, self._wake)
            try:
                await self._arrived
            finally:
                timer.cancel()
                self._arrived = None
        return self._items.popleft() if self._items else None

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


class FrameReceiver:
    """Listens for replicas and hands what they send to the requests that wait for it."""

    def __init__(self) -> None:
        self._secret = secrets.token_hex(32)
        self._numbers = itertools.count()
        self._inboxes: dict[int, Inbox] = {}
        self._server: asyncio.Server | None = None
        self._address: tuple[str, int] | None = None
        self._strangers = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def listen(self, host: str) -> None:
        """Listen on a free port of this node.

        Where that fails replicas answer through Ray's own streams, which carry less.

        Args:
            host: the node's address in the cluster's network.
        """
        try:
            self._server = await asyncio.start_server(
                self._serve, host, 0, ssl=server_context(), limit=1 << 20
            )
        except (OSError, KeyError) as error:
            log.warning("frames.not_listening", host=host, cause=str(error))
            return
        self._address = (host, self._server.sockets[0].getsockname()[1])

    @contextmanager
    def open(self) -> Iterator[Inbox]:
        """Return where the items of one request arrive, until the block ends."""
        key = next(self._numbers)
        reply_to = ReplyTo(*self._address, self._secret, key) if self._address else None
        inbox = self._inboxes[key] = Inbox(reply_to)
        try:
            yield inbox
        finally:
            inbox.closed = True
            del self._inboxes[key]

    def close(self) -> None:
        """Stop listening and end the connections."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()  # who reads from it is at its end then

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strangers >= MAX_STRANGERS:
            writer.close()
            return
        self._writers.add(writer)
        connection = _Connection(self._inboxes)
        try:
            if await self._knows(reader):
                writer.write(frames.WELCOME)
                await connection.read(reader)
        except (EOFError, OSError):
            pass  # a replica that has ended
        except ValueError as error:
            # Not the error's text: it may quote what a client was answered.
            peer = str(writer.get_extra_info("peername"))
            log.error("frames.broken", peer=peer, cause=type(error).__name__)
        finally:
            self._writers.discard(writer)
            connection.lost()
            writer.close()

    async def _knows(self, reader: asyncio.StreamReader) -> bool:
        """Return whether the peer has this ingress' secret, which only replicas were given."""
        self._strangers += 1
        try:
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                said = await frames.read(reader, max_bytes=frames.MAX_HELLO_BYTES)
        except TimeoutError:
            return False
        finally:
            self._strangers -= 1
        return hmac.compare_digest(said, self._secret.encode())


class _Connection:
    """One replica's connection."""

    def __init__(self, inboxes: dict[int, Inbox]) -> None:
        self.alive_at = time.monotonic()
        self._inboxes = inboxes

    async def read(self, reader: asyncio.StreamReader) -> None:
        """Hand frames on until the connection ends; the key of a client that left is unknown."""
        while True:
            body = await frames.read(reader)
            if len(body) > LARGE_BYTES:  # another one may be here already, and others wait
                await asyncio.sleep(0)
            self._hand_on(frames.decode(body))

    def _hand_on(self, frame: frames.Frame) -> None:
        self.alive_at = time.monotonic()
        for key in frame.taken:
            if inbox := self._inboxes.get(key):
                inbox.sign_of_life(self)
        for key, delta in frame.deltas:
            if inbox := self._inboxes.get(key):
                inbox.put(delta)
        for key, failure in frame.failures:
            if inbox := self._inboxes.get(key):
                inbox.put(failure.error())

    def lost(self) -> None:
        """Fail the requests that this replica has."""
        for inbox in self._inboxes.values():
            if inbox.connection is self:
                inbox.put(EngineDead(LOST, cause=NO_CONNECTION))
