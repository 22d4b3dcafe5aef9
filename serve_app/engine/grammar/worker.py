"""A process that compiles one grammar and walks it for any number of completions.

Each operation has a limit of processor time, all of them together one of memory; passing one
ends the process. The kernel sees to that, so it holds in the middle of a compiler, too.
"""

from __future__ import annotations

import mmap
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from llguidance import LLMatcher, LLParserLimits

from serve_app.engine.grammar.compile import translate
from serve_app.engine.grammar.wire import (
    CLOSE,
    COMMAND,
    COMPILED,
    FAULT,
    MESSAGE_BYTES,
    OPEN,
    READY,
    REPLY,
    Job,
    Settings,
)

MAX_FAULT_CHARS = 200
# Where llguidance's own word for a fault says nothing to a client.
WORDS = {
    "NoExtension": "nothing can satisfy it",
    "NoExtensionBias": "nothing can satisfy it",
    "ParserTooComplex": "it is too complex: too many ways to read one text",
    "LexerTooComplex": "it is too complex: an expression in it has too many states",
}


def work(
    connection: socket.socket, slots: int, job: Job, tokens: Any, settings: Settings
) -> NoReturn:
    """Compile a grammar, then walk it for whoever asks, until the engine closes the connection."""
    limits = settings.limits
    memory = _Memory()
    memory.limit(limits.compile_bytes)
    masks = mmap.mmap(slots, settings.slots * settings.mask_bytes)
    os.close(slots)
    try:
        with _processor_time(limits.compile_cpu_s):
            walk = _compile(job, tokens)
            first = walk.compute_bitmask()[: settings.mask_bytes]
        fault = walk.get_error() or _dead_end(first)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        fault = str(error) or type(error).__name__
    if fault:
        connection.send(REPLY.pack(FAULT, COMPILED, memory.used_kib) + _line(fault))
        os._exit(0)
    memory.limit(limits.walk_bytes)
    connection.send(REPLY.pack(READY, COMPILED, memory.used_kib))
    worker = _Worker(connection, masks, settings, memory)
    while message := connection.recv(MESSAGE_BYTES):
        for operation, number, value in COMMAND.iter_unpack(message):
            worker.do(operation, number, value, walk, first)
    os._exit(0)


def _compile(job: Job, tokens: Any) -> Any:
    grammar = translate(job.kind, job.definition, strict=job.strict)
    # Errors in llguidance's own words carry the grammar; the first line is all that is used.
    bounds = LLParserLimits(max_lexer_states=20_000, verbose_errors=False)
    walk = LLMatcher(tokens, grammar, log_level=0, limits=bounds)
    if walk.is_error():
        raise ValueError(walk.get_error())
    return walk


class _Completion:
    """One completion's walk, where its mask goes, and what it may still cost."""

    __slots__ = ("cpu_s", "slot", "walk")

    def __init__(self, walk: Any, slot: int, cpu_s: float) -> None:
        self.walk = walk
        self.slot = slot
        self.cpu_s = cpu_s


class _Worker:
    """Walks one compiled grammar."""

    def __init__(
        self, connection: socket.socket, masks: mmap.mmap, settings: Settings, memory: _Memory
    ) -> None:
        self._connection = connection
        self._masks = masks
        self._size = settings.mask_bytes
        self._limits = settings.limits
        self._memory = memory
        self._completions: dict[int, _Completion] = {}

    def do(self, operation: int, number: int, value: int, walk: Any, first: bytes) -> None:
        if operation == CLOSE:
            self._completions.pop(number, None)
            return
        if operation == OPEN:
            copy = walk.deep_copy()
            self._completions[number] = _Completion(copy, value, self._limits.walk_cpu_s)
            self._reply(number, first)
            return
        completion = self._completions[number]
        started = time.process_time()
        with _processor_time(self._limits.step_cpu_s):
            completion.walk.consume_token(value)
            mask = completion.walk.compute_bitmask()
        completion.cpu_s -= time.process_time() - started - self._limits.token_cpu_s
        fault = completion.walk.get_error() or _dead_end(mask[: self._size])
        if not fault and completion.cpu_s < 0:
            fault = "its masks take too much processor time"
        self._reply(number, mask, fault)

    def _reply(self, number: int, mask: bytes, fault: str = "") -> None:
        if fault:
            reply = REPLY.pack(FAULT, number, self._memory.used_kib) + _line(fault)
        else:
            start = self._completions[number].slot * self._size
            self._masks[start : start + self._size] = mask[: self._size]
            reply = REPLY.pack(READY, number, self._memory.used_kib)
        self._connection.send(reply)


class _Memory:
    """What this process may still take."""

    def __init__(self) -> None:
        self._start_kib = self._peak_kib()

    @property
    def used_kib(self) -> int:
        """Return what it has taken at the most over what it started with."""
        return max(0, self._peak_kib() - self._start_kib)

    def limit(self, more: int) -> None:
        """Let the kernel refuse memory when `more` bytes are taken over what is mapped now."""
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            mapped = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + more, resource.RLIM_INFINITY))

    def _peak_kib(self) -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def _processor_time(seconds: float) -> Iterator[None]:
    """End this process if what is inside takes longer; SIGPROF needs no help of Python's."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _dead_end(mask: bytes) -> str:
    """Return what is wrong with a mask that allows nothing."""
    return "" if mask.strip(b"\0") else "no token can follow, and it is not complete"


def _line(text: str) -> bytes:
    line = text.partition("\n")[0][:MAX_FAULT_CHARS]
    return WORDS.get(line, line).encode("utf-8", "replace")
