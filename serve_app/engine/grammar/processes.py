"""The server and its workers as the engine's side holds them: started, asked, ended."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import structlog

from serve_app.engine.grammar.matcher import Worker
from serve_app.engine.grammar.wire import MESSAGE_BYTES, Job, Settings

log = structlog.get_logger()

COMPILE_TIMEOUT_S = 7.0  # wall clock, for a machine that is busy with other things
RENICE_AFTER_S = 0.1
START_TIMEOUT_S = 120.0
EXCHANGE_TIMEOUT_S = 5.0


class Unavailable(Exception):
    """The tokenizer cannot be used for grammars; a sentence."""


class Server:
    """The process that forks workers; started when it is needed, and again when it is gone."""

    def __init__(self, settings: Settings, check_memory: Callable[[], None]) -> None:
        self._settings = settings
        self.check_memory = check_memory
        self._lock = threading.Lock()  # one exchange at a time
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._fault: str | None = None

    def start(self, tokenizer: Callable[[], str]) -> None:
        """Start the server unless it runs; blocks for a second.

        Raises:
            Unavailable: its tokenizer cannot be used.
            OSError: no process can be made.
        """
        with self._lock:
            if self._fault is not None:
                raise Unavailable(self._fault)
            if self._process is not None and self._process.poll() is None:
                return
            self._drop()
            # Of packets: a message is whole or not there, also when its sender dies.
            self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._control.settimeout(START_TIMEOUT_S)
            with theirs:
                self._process = subprocess.Popen(  # noqa: S603 - our own module
                    [sys.executable, "-m", "serve_app.engine.grammar.server", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,  # what a compiler prints may quote a client
                    start_new_session=True,  # Ctrl-C in a terminal is the engine's to handle
                )
            text = _file("tokenizer", tokenizer().encode())
            try:
                socket.send_fds(self._control, [self._settings.dump()], [text])
            finally:
                os.close(text)
            answer = json.loads(self._control.recv(MESSAGE_BYTES) or '{"fault": "it ended"}')
            if fault := answer.get("fault"):
                log.warning("grammar.unavailable", reason=fault)
                self._fault = f"this model's tokenizer cannot be used for structures: {fault}"
                raise Unavailable(self._fault)

    def spawn(self, job: Job) -> Worker:
        """Start a worker on a job.

        Raises:
            OSError: no process can be made.
        """
        settings = self._settings
        size = settings.slots * settings.mask_bytes
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Memory that both sides map: a mask of 16 KB a token would be too slow through a socket.
        slots = os.memfd_create("masks")
        text = _file("job", json.dumps(asdict(job)).encode())
        try:
            os.ftruncate(slots, size)
            answer = self._exchange({"do": "spawn"}, [theirs.fileno(), slots, text])
            masks = mmap.mmap(slots, size)
        finally:
            theirs.close()
            os.close(slots)
            os.close(text)
        return Worker(answer["pid"], ours, masks, settings.mask_bytes, self)

    def first_message(self, worker: Worker) -> bytes | None:
        """Wait for what a compilation came to.

        Returns:
            The reply; b"" if the process ended, None if it takes longer than it may.
        """
        connection = worker.connection
        for seconds in (RENICE_AFTER_S, COMPILE_TIMEOUT_S - RENICE_AFTER_S):
            connection.settimeout(seconds)
            try:
                return connection.recv(MESSAGE_BYTES)
            except TimeoutError:
                self._govern("nice", worker)  # it is not one of the quick ones
            except OSError:
                return b""
            finally:
                connection.settimeout(0)
        return None

    def kill(self, worker: Worker) -> None:
        """End a process; one that has ended is none."""
        self._govern("kill", worker)

    def explain(self, worker: Worker, *, compiling: bool = False) -> str:
        """Return, as a sentence, why a worker has ended."""
        limits = self._settings.limits
        status = self._govern("status", worker)
        what = "compiling it" if compiling else "one of its masks"
        seconds = limits.compile_cpu_s if compiling else limits.step_cpu_s
        if status is None or not os.WIFSIGNALED(status):
            return f"{what} failed inside the compiler"
        match os.WTERMSIG(status):
            case signal.SIGPROF:
                return f"{what} takes more than {seconds:g} s of processor time"
            case signal.SIGSEGV | signal.SIGBUS:
                return f"{what} overflows the compiler's stack; it is nested too deeply"
            case signal.SIGABRT:
                mib = (limits.compile_bytes if compiling else limits.walk_bytes) >> 20
                return f"{what} takes more than {mib} MiB of memory, or too deep a nesting"
        return f"{what} was ended for want of memory"

    def close(self) -> None:
        """End the server."""
        with self._lock:
            self._drop()

    def _govern(self, what: str, worker: Worker) -> int | None:
        try:
            status: int | None = self._exchange({"do": what, "pid": worker.pid}, [])["status"]
        except OSError:  # the server is gone, and its workers with it
            return None
        return status

    def _exchange(self, command: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Ask the server; it answers in milliseconds, or is gone.

        Raises:
            OSError: it is gone, or starts again.
        """
        # Bounded, because the engine's thread asks too, and starting the server takes a second.
        if not self._lock.acquire(timeout=EXCHANGE_TIMEOUT_S):
            raise TimeoutError("the grammar server is starting")
        try:
            if self._control is None:
                raise OSError("the grammar server is not running")
            try:
                self._control.settimeout(EXCHANGE_TIMEOUT_S)
                socket.send_fds(self._control, [json.dumps(command).encode()], descriptors)
                message = self._control.recv(MESSAGE_BYTES)
            except OSError:
                message = b""
            if not message:
                self._drop()  # an answer that comes later would be taken for the next one's
                raise OSError("the grammar server has ended")
        finally:
            self._lock.release()
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _drop(self) -> None:
        """End the server, with the lock held; `start` makes another."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _environment() -> dict[str, str]:
    """Return what the server needs of our environment, which may hold a token."""
    names = ("PATH", "LD_LIBRARY_PATH", "LANG")
    kept = {name: os.environ[name] for name in names if name in os.environ}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _file(name: str, content: bytes) -> int:
    descriptor = os.memfd_create(name)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    return descriptor
