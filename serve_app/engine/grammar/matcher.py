"""One completion's way through a grammar, as the engine's thread sees it.

The thread sends the token that was sampled and goes on with its step; the mask of the next one
is computed by the worker meanwhile. Nothing here waits longer than its limit: a completion
whose mask is late sits out a step, and one whose worker is gone fails alone.
"""

from __future__ import annotations

import itertools
import mmap
import select
import socket
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from serve_app.engine.grammar.wire import (
    ADVANCE,
    CLOSE,
    COMMAND,
    COMPILED,
    FAULT,
    MESSAGE_BYTES,
    OPEN,
    REPLY,
)
from serve_app.errors import Overloaded

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Far above any mask; the worker's own limits are of processor time, this one ends one that is
# stopped or starved.
MASK_TIMEOUT_S = 15.0
# Masks in time after which a completion that was late is waited for again.
FORGIVEN_AFTER = 16

# Memory that a worker may grow by until somebody looks at all of them together.
UNCHECKED_KIB = 16 << 10

_numbers = itertools.count(COMPILED + 1)  # of completions; a number is never used again


Begin: TypeAlias = "Callable[[int, int, Worker], Matcher]"


class Host(Protocol):
    """What a worker's process belongs to; any thread, and never for long."""

    def explain(self, worker: Worker) -> str:
        """Return, as a sentence, why a process has ended."""
        ...

    def kill(self, worker: Worker) -> None:
        """End a process."""
        ...

    def check_memory(self) -> None:
        """Keep all processes together in their bound; may `end` any worker."""
        ...


class Worker:
    """A grammar that is compiled in a process of its own.

    `open` and `end` may be called on any thread; everything else is for the engine's.

    Args:
        pid: of the process.
        connection: to it; non-blocking from here on.
        masks: shared with it, a slot of `mask_bytes` for each completion.
        mask_bytes: size of one mask.
        host: what it belongs to.
    """

    def __init__(
        self, pid: int, connection: socket.socket, masks: mmap.mmap, mask_bytes: int, host: Host
    ) -> None:
        self.pid = pid
        self.connection = connection
        self.memory_kib = 0
        self.last_used = time.monotonic()
        self.fault: str | None = None  # why it walks no more; a sentence
        self._masks = masks
        self._mask_bytes = mask_bytes
        self._host = host
        self._checked_kib = 0
        self._free = list(range(len(masks) // mask_bytes))
        self._open: dict[int, Matcher] = {}
        connection.settimeout(0)

    @property
    def completions(self) -> int:
        """How many walk the grammar now."""
        return len(self._open)

    def open(self, count: int = 1, begin: Begin | None = None) -> list[Matcher]:
        """Begin completions; the first mask of each is on its way.

        Args:
            count: how many.
            begin: makes the walk of a number, a slot and this worker; None for a plain one.

        Raises:
            Overloaded: as many as the engine ever takes on walk it, or have not been closed yet.
        """
        self.last_used = time.monotonic()
        if len(self._free) < count:
            raise Overloaded("Too many completions have this structure now.", retry_after_s=1)
        made = begin or Matcher
        matchers = [made(next(_numbers), self._free.pop(), self) for _ in range(count)]
        for matcher in matchers:
            self._open[matcher.number] = matcher
            matcher.send(OPEN, matcher.slot)
        return matchers

    def send(self, operation: int, number: int, value: int) -> None:
        """Ask the process for something; what cannot be sent ends it."""
        try:
            self.connection.send(COMMAND.pack(operation, number, value))
        except OSError as error:  # it is gone, or has not read for hundreds of messages
            if operation != CLOSE:
                self.end(None if isinstance(error, BrokenPipeError) else "its process hangs")

    def close(self, matcher: Matcher) -> None:
        """Forget a completion."""
        if self._open.pop(matcher.number, None) is not None:
            self.send(CLOSE, matcher.number, 0)
            self._free.append(matcher.slot)
            self.last_used = time.monotonic()

    def read(self) -> None:
        """Take every reply that has come."""
        while self.fault is None:
            try:
                message = self.connection.recv(MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self.end(None)
                return
            kind, number, self.memory_kib = REPLY.unpack_from(message)
            if matcher := self._open.get(number):
                fault = message[REPLY.size :].decode("utf-8", "replace")
                matcher.settle(fault if kind == FAULT else None)
            if self.memory_kib > self._checked_kib + UNCHECKED_KIB:
                self._checked_kib = self.memory_kib
                self._host.check_memory()

    def end(self, why: str | None) -> None:
        """Fail all that walk the grammar, and end the process.

        Args:
            why: a sentence; None if the process is gone and its status says it.
        """
        if self.fault is None:
            self.fault = why or self._host.explain(self)
            self._host.kill(self)
        for matcher in list(self._open.values()):
            matcher.settle(self.fault)

    def mask(self, slot: int) -> NDArray[np.uint8]:
        """Return the bits of a slot, least significant first, as they stand there."""
        return np.frombuffer(self._masks, np.uint8, self._mask_bytes, slot * self._mask_bytes)


class Matcher:
    """A completion's walk; for the engine's thread.

    Args:
        number: unique among all completions.
        slot: where its masks come.
        worker: walks.
    """

    __slots__ = ("_in_time", "_since", "_worker", "fault", "number", "pending", "slot")

    def __init__(self, number: int, slot: int, worker: Worker) -> None:
        self.number = number
        self.slot = slot
        self.pending = False  # whether a mask is on its way
        self.fault: str | None = None  # why there will be no further mask; a client's mistake
        self._worker = worker
        self._since = 0.0
        self._in_time = FORGIVEN_AFTER

    @property
    def worker(self) -> Worker:
        """What walks."""
        return self._worker

    @property
    def mask(self) -> NDArray[np.uint8]:
        """Which tokens may come next: bits, least significant first; valid until `advance`."""
        return self._worker.mask(self.slot)

    @property
    def is_slow(self) -> bool:
        """Whether a step had to do without it lately."""
        return self._in_time < FORGIVEN_AFTER

    @property
    def sits_out(self) -> bool:
        """Whether a step should not count on it: its mask is not there, and may not be in time."""
        if self.pending and self.is_slow:
            self._worker.read()
            self.check()
        return self.pending and self.is_slow

    def advance(self, token: int) -> None:
        """Go on with a sampled token; the next mask is on its way."""
        if self.fault is None:
            self.send(ADVANCE, token)

    def send(self, operation: int, value: int) -> None:
        """Ask for a mask."""
        if self._worker.fault is not None:
            self.fault = self._worker.fault
            return
        self.pending, self._since = True, time.monotonic()
        self._worker.send(operation, self.number, value)

    def settle(self, fault: str | None) -> None:
        """Take the reply: the mask is there, or there will be none."""
        self.pending = False
        self.fault = self.fault or fault
        self._in_time += self._in_time < FORGIVEN_AFTER

    def was_late(self) -> None:
        """Note that a step had to do without its mask."""
        self._in_time = 0
        self.check()

    def check(self) -> None:
        """End a worker that does not answer at all."""
        if self.pending and time.monotonic() - self._since > MASK_TIMEOUT_S:
            self._worker.end(f"a mask was not there within {MASK_TIMEOUT_S:g} s")

    def close(self) -> None:
        """Forget the walk; calling it again does nothing."""
        self._worker.close(self)


def wait(matchers: Collection[Matcher], seconds: float, *, until_all: bool = True) -> None:
    """Wait for masks.

    Args:
        matchers: whose; those that have theirs do not matter.
        seconds: at the most.
        until_all: go on until all are there; otherwise return at the first.
    """
    deadline = time.monotonic() + seconds
    pending = [matcher for matcher in matchers if matcher.pending]
    while pending:
        workers = {matcher.worker.connection.fileno(): matcher.worker for matcher in pending}
        for worker in workers.values():
            worker.read()
        left = [matcher for matcher in pending if matcher.pending]
        if not left or (len(left) < len(pending) and not until_all):
            return
        pending = left
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return
        poll = select.poll()
        for descriptor in workers:
            poll.register(descriptor, select.POLLIN)
        poll.poll(remaining * 1000)
