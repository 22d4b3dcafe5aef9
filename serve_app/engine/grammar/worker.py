"""The processes that compile and walk grammars: a server that forks a worker per grammar.

The server holds llguidance's view of the tokenizer, which takes a second to make; a fork shares
it. It never touches a client's text. A worker compiles one grammar and walks it for any number
of completions; each operation has a limit of processor time, the whole of it one of memory, and
passing a limit ends the process. Nothing here imports more than the standard library and
llguidance: a fork has to be small and quick.

    engine ──control socket──► server   spawn (with the worker's descriptors), and what to do
                                        with a worker: nice, kill, status
    engine ──worker socket───► worker   OPEN, ADVANCE, CLOSE a completion; a reply for each mask
    engine ◄─shared memory─── worker   the masks, a slot for each completion
"""

from __future__ import annotations

import gc
import json
import mmap
import os
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

OPEN, ADVANCE, CLOSE = 1, 2, 3
READY, FAULT = 1, 2
COMMAND = struct.Struct("<BIi")  # operation, completion, its slot or the token to go on with
REPLY = struct.Struct("<BIi")  # READY or FAULT, completion, memory in KiB; a fault's text follows
MESSAGE_BYTES = 65_536
MAX_FAULT_CHARS = 200
# Where llguidance's own word for a fault says nothing to a client.
WORDS = {
    "NoExtension": "nothing can satisfy it",
    "NoExtensionBias": "nothing can satisfy it",
    "ParserTooComplex": "it is too complex: too many ways to read one text",
    "LexerTooComplex": "it is too complex: an expression in it has too many states",
}
COMPILED = 0  # the completion's number in the reply that the grammar is compiled


@dataclass(frozen=True, slots=True)
class Limits:
    """What one grammar may cost.

    Args:
        compile_cpu_s: processor time to compile it and to make its first mask.
        step_cpu_s: processor time of one further mask.
        walk_cpu_s: processor time of one completion's masks together, over `token_cpu_s` each.
        token_cpu_s: see there.
        compile_bytes: memory over what the worker starts with.
        walk_bytes: memory over what the compiled grammar takes.
    """

    compile_cpu_s: float = 2.0
    step_cpu_s: float = 0.5
    walk_cpu_s: float = 2.0
    token_cpu_s: float = 0.02
    compile_bytes: int = 384 << 20
    walk_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server starts with; the tokenizer's JSON comes in a descriptor of its own.

    Args:
        vocab_size: bits of a mask.
        eos_token_ids: any of them may end a completion that is complete.
        slots: completions of one grammar at a time.
        limits: of each worker.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    slots: int
    limits: Limits

    @property
    def mask_bytes(self) -> int:
        """Return the size of one mask: whole 32-bit words."""
        return (self.vocab_size + 31) // 32 * 4

    def dump(self) -> bytes:
        """Return the settings as a message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, message: bytes) -> Settings:
        """Return the settings of a message."""
        fields = json.loads(message)
        return cls(
            fields["vocab_size"],
            tuple(fields["eos_token_ids"]),
            fields["slots"],
            Limits(**fields["limits"]),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One grammar to compile: `protocol.Structure`, as plain data."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    definition: str
    strict: bool


def read_all(descriptor: int) -> bytes:
    """Return what a descriptor's file holds, from its beginning, and close it."""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def main(descriptor: int) -> None:
    """Run the server until the engine is gone.

    Args:
        descriptor: of the control socket.
    """
    control = socket.socket(fileno=descriptor)
    _be_expendable()
    message, (tokenizer, *_), *_ = socket.recv_fds(control, MESSAGE_BYTES, 1)
    settings = Settings.parse(message)
    try:
        tokens = _tokens(read_all(tokenizer).decode(), settings)
    except (ValueError, TypeError, OSError) as error:
        control.send(json.dumps({"fault": str(error).partition("\n")[0][:300]}).encode())
        return
    gc.freeze()  # a collection in a fork would write to every page that it shares
    control.send(b"{}")
    statuses: dict[int, int] = {}
    while True:
        message, descriptors, *_ = socket.recv_fds(control, MESSAGE_BYTES, 3)
        if not message:
            return
        _reap(statuses)
        command = json.loads(message)
        if command["do"] == "spawn":
            answer: dict[str, int | None] = {"pid": _spawn(control, descriptors, tokens, settings)}
        else:
            answer = {"status": _govern(command["do"], command["pid"], statuses)}
        control.send(json.dumps(answer).encode())


def _be_expendable() -> None:
    """Leave no core, which would hold a client's text, and be the first to go without memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write("1000")
    except OSError:  # no such file, or none that may be written: only the order is lost
        pass


def _tokens(tokenizer: str, settings: Settings) -> Any:
    from llguidance import LLTokenizer  # noqa: PLC0415 - the engine's side imports this module

    from serve_app.engine.grammar import compile as _  # noqa: F401, PLC0415 - once, not in each fork

    return LLTokenizer(
        tokenizer, n_vocab=settings.vocab_size, eos_token=list(settings.eos_token_ids)
    )


def _reap(statuses: dict[int, int]) -> None:
    """Collect the workers that have ended, so that none stays as a zombie."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            statuses[ended[0]] = ended[1]
    except ChildProcessError:  # there is none
        pass
    for pid in list(statuses)[:-256]:  # of those that nobody asked for
        del statuses[pid]


def _govern(what: str, pid: int, statuses: dict[int, int]) -> int | None:
    """Do something with a worker; only its parent can be sure that the number is still its own.

    Returns:
        For `status` the wait status of a worker that is ending; None where nobody knows.
    """
    if pid not in statuses:
        try:
            if what == "nice":
                os.setpriority(os.PRIO_PROCESS, pid, 19)
            elif what == "kill":
                os.kill(pid, signal.SIGKILL)
            elif what == "status":
                statuses[pid] = os.waitpid(pid, 0)[1]
        except OSError:  # there is no such worker
            return None
    return statuses.pop(pid, None) if what == "status" else None


def _spawn(control: socket.socket, descriptors: list[int], tokens: Any, settings: Settings) -> int:
    pid = os.fork()
    if not pid:
        try:
            control.close()
            connection, slots, job = descriptors
            work(socket.socket(fileno=connection), slots, Job(**json.loads(read_all(job))), tokens,
                 settings)  # fmt: skip
        finally:
            os._exit(1)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


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
    from llguidance import LLMatcher, LLParserLimits  # noqa: PLC0415

    from serve_app.engine.grammar.compile import translate  # noqa: PLC0415

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


if __name__ == "__main__":
    main(int(sys.argv[1]))
