"""How deltas look on the connection between a replica and an ingress.

A stream of Ray costs 0.3 to 0.4 ms of a core for each item at either end, whatever its size. So
all that a replica has for the requests of one ingress after a step travels as one frame on one
connection, and Ray's own call stays open beside it: it routes, counts and cancels a request.

A frame is four bytes of length and JSON. No pickle: what a socket says must not become code.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import ConfigDict, TypeAdapter

from serve_app import errors
from serve_app.errors import Detail, ServeAppError
from serve_app.protocol import TokenDelta

MAX_HELLO_BYTES = 256  # before the peer has said who it is
WELCOME = b"\x01"  # all that an ingress ever says: it knows the secret, and frames may come
MAX_FRAME_BYTES = 1 << 30  # a prompt's logprobs are the largest
_LENGTH = struct.Struct("!I")


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the deltas of one request are waited for.

    Args:
        host: address of the ingress in the cluster's network.
        port: where it listens for replicas.
        secret: what the first frame of a connection has to say; goes over Ray alone.
        key: the request's number in that ingress.
    """

    host: str
    port: int
    secret: str = field(repr=False)
    key: int = 0


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of ours, to be raised at the other end."""

    kind: str
    message: str
    param: str | None
    details: dict[str, Detail]

    @classmethod
    def of(cls, error: ServeAppError) -> Failure:
        """Return what `error` becomes; its message as UTF-8 can have it."""
        message = error.message.encode(errors="replace").decode()
        return cls(type(error).__name__, message, error.param, error.details)

    def error(self) -> ServeAppError:
        """Return the error that it was."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, ServeAppError)):
            kind = errors.EngineError
        return kind(self.message, param=self.param, **self.details)


@dataclass(slots=True)
class Frame:
    """What happened since the frame before, by the requests' keys.

    Args:
        taken: requests that the replica has taken on.
        deltas: in order.
        failures: requests that ended with an error, after their deltas.
    """

    taken: list[int] = field(default_factory=list)
    deltas: list[tuple[int, TokenDelta]] = field(default_factory=list)
    failures: list[tuple[int, Failure]] = field(default_factory=list)


_Parts = tuple[list[int], list[tuple[int, TokenDelta]], list[tuple[int, Failure]]]
_FRAME: TypeAdapter[_Parts] = TypeAdapter(
    _Parts,
    config=ConfigDict(
        ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants"
    ),
)


def encode(frame: Frame) -> bytes:
    """Return a frame's bytes, its length before them.

    What cannot be written, as half a surrogate pair that a chat template made, is the error of its
    own request: the others in the frame lose nothing.
    """
    try:
        return _packed(frame)
    except ValueError:
        return b"".join(_one_by_one(frame))


def _packed(frame: Frame) -> bytes:
    body = _FRAME.dump_json((frame.taken, frame.deltas, frame.failures))
    return _LENGTH.pack(len(body)) + body


def _one_by_one(frame: Frame) -> Iterator[bytes]:
    yield _packed(Frame(taken=frame.taken))
    for key, delta in frame.deltas:
        yield _packed_or_failed(key, Frame(deltas=[(key, delta)]))
    for key, failure in frame.failures:
        yield _packed_or_failed(key, Frame(failures=[(key, failure)]))


def _packed_or_failed(key: int, frame: Frame) -> bytes:
    try:
        return _packed(frame)
    except ValueError:
        unwritten = errors.EngineError("generation failed", cause="unwritable")
        return _packed(Frame(failures=[(key, Failure.of(unwritten))]))


def decode(body: bytes) -> Frame:
    """Return the frame that `encode` wrote, of the bytes behind the length.

    Raises:
        ValueError: it is none.
    """
    return Frame(*_FRAME.validate_json(body))


def hello(secret: str) -> bytes:
    """Return what a replica says first."""
    body = secret.encode()
    return _LENGTH.pack(len(body)) + body


async def read(reader: asyncio.StreamReader, *, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """Return the bytes of the next frame, without their length.

    Raises:
        EOFError: the connection has ended.
        ValueError: the frame is larger than `max_bytes`.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > max_bytes:
        raise ValueError(f"a frame of {length} bytes")
    return await reader.readexactly(length)
