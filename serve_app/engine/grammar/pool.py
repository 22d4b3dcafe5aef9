"""The engine's side of the workers: compile once, reuse, replace what dies, bound all of it.

A grammar is compiled for the first request that has it and kept for the next ones, by content; a
refusal is kept as well. Compiling starts at an ordinary priority and goes on at the lowest when
it takes long, so that it costs others nothing. Clients take turns for the places to compile;
while all are taken, the one that has compiled longest makes room for the next. Whoever waits
too long is asked to come back.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import structlog

from serve_app.engine.grammar.fair_executor import FairExecutor
from serve_app.engine.grammar.limits import check_text
from serve_app.engine.grammar.matcher import Worker
from serve_app.engine.grammar.processes import COMPILE_TIMEOUT_S, Server, Unavailable
from serve_app.engine.grammar.wire import FAULT, REPLY, Job, Limits, Settings
from serve_app.errors import EngineError, InvalidRequest, Overloaded, ServeAppError
from serve_app.protocol import Structure

log = structlog.get_logger()

COMPILERS = 8  # grammars that are compiled at a time
COMPILERS_PER_CLIENT = 4
MAX_QUEUED = 256  # structures that may wait for one of those places
MAX_QUEUED_PER_CLIENT = 128
MAX_WAIT_S = COMPILE_TIMEOUT_S + 1.0  # for a place and for the compilation
MAX_WORKERS = 96
MAX_REFUSALS = 1024
MEMORY_KIB = 2 << 20  # of all workers together, over what they share
EVICTABLE_AFTER_S = 1.0
IDLE_S = 5.0  # a grammar that was asked for so lately is about to be used
RETRY_AFTER_S = 2
RETRY = "The server is busy compiling other structures. Please try again in a moment."


@dataclass(slots=True)
class _Compilation:
    """A grammar on its way."""

    client: str
    future: Future[Worker] = field(default_factory=Future)
    asked: float = field(default_factory=time.monotonic)
    started: float = 0.0  # monotonic; 0 while it waits for its place
    worker: Worker | None = None
    evicted: bool = False


class GrammarPool:
    """Compiled grammars for one tokenizer; any thread, any event loop.

    Args:
        tokenizer: returns the tokenizer's JSON; called once, at the first structure.
        vocab_size: rows of the embedding.
        eos_token_ids: any of them may end a completion that is complete.
        slots: completions that an engine takes on at the most.
        limits: of each grammar.
    """

    def __init__(
        self,
        tokenizer: Callable[[], str],
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        slots: int,
        limits: Limits | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._settings = Settings(
            vocab_size, tuple(sorted(eos_token_ids)), slots, limits or Limits()
        )
        self._executor = FairExecutor(
            COMPILERS, threads_per_client=COMPILERS_PER_CLIENT, name="grammar"
        )
        self._lock = threading.Lock()  # of what follows
        self._workers: OrderedDict[str, Worker] = OrderedDict()  # least recently used first
        self._refusals: OrderedDict[str, str] = OrderedDict()
        self._compiling: dict[str, _Compilation] = {}
        self._server = Server(self._settings, self._check_memory)

    async def compile(self, structure: Structure, client: str = "") -> Worker:
        """Return a worker that has compiled a structure and made its first mask.

        Args:
            structure: of a request.
            client: who sent it.

        Raises:
            InvalidRequest: malformed, over a limit, or not to be enforced; says which.
            Overloaded: too many structures are being compiled.
        """
        try:
            async with asyncio.timeout(MAX_WAIT_S):
                return await asyncio.shield(asyncio.wrap_future(self._find(structure, client)))
        except TimeoutError:
            raise Overloaded(RETRY, retry_after_s=RETRY_AFTER_S) from None

    def start(self) -> None:
        """Start the server, so that the first structure finds it ready; blocks for a second.

        Raises:
            InvalidRequest: the tokenizer cannot be used for grammars.
        """
        try:
            self._server.start(self._tokenizer)
        except Unavailable as error:
            raise _refused(str(error)) from None

    def close(self) -> None:
        """End every process."""
        self._executor.shutdown()
        with self._lock:
            workers = list(self._workers.values())
            self._workers.clear()
        for worker in workers:
            worker.end("the engine was closed")
        self._server.close()

    def _find(self, structure: Structure, client: str) -> Future[Worker]:
        key = _key(structure)
        with self._lock:
            if (worker := self._workers.get(key)) is not None:
                if worker.fault is None:
                    self._workers.move_to_end(key)
                    worker.last_used = time.monotonic()
                    return _done(worker)
                del self._workers[key]
            if (refusal := self._refusals.get(key)) is not None:
                return _failed(_refused(refusal))
            if (known := self._compiling.get(key)) is not None:
                return known.future
            theirs = sum(one.client == client for one in self._compiling.values())
            if (
                theirs >= COMPILERS_PER_CLIENT + MAX_QUEUED_PER_CLIENT
                or len(self._compiling) >= COMPILERS + MAX_QUEUED
            ):
                return _failed(Overloaded(RETRY, retry_after_s=RETRY_AFTER_S))
            if not self._settings.eos_token_ids:
                return _failed(
                    _refused("this model has no end-of-sequence token, nothing could end")
                )
            compilation = _Compilation(client)
            self._compiling[key] = compilation
            self._evict_compilation()
        try:
            self._executor.submit(client, partial(self._run, key, structure, compilation))
        except RuntimeError:  # closed meanwhile
            self._settle(key, compilation, Overloaded(RETRY, retry_after_s=RETRY_AFTER_S))
        return compilation.future

    def _evict_compilation(self) -> None:
        """Let the longest one of who compiles most go when no place is left; lock held."""
        running = [one for one in self._compiling.values() if one.started and not one.evicted]
        if len(running) < COMPILERS:
            return
        ((most, _),) = Counter(one.client for one in running).most_common(1)
        longest = min((one for one in running if one.client == most), key=lambda one: one.started)
        if time.monotonic() - longest.started > EVICTABLE_AFTER_S and longest.worker:
            longest.evicted = True
            self._server.kill(longest.worker)

    def _run(self, key: str, structure: Structure, compilation: _Compilation) -> None:
        compilation.started = time.monotonic()
        outcome: Worker | ServeAppError = EngineError("The structure could not be compiled.")
        try:
            outcome = self._compile(structure, compilation)
        except ServeAppError as error:
            outcome = error
        except OSError as error:  # no process, no descriptor, no memory
            log.error("grammar.failed", cause=str(error))
            outcome = Overloaded(RETRY, retry_after_s=RETRY_AFTER_S)
        finally:  # whatever comes, somebody waits for it
            self._settle(key, compilation, outcome)

    def _settle(self, key: str, compilation: _Compilation, outcome: Worker | ServeAppError) -> None:
        with self._lock:
            del self._compiling[key]
            if isinstance(outcome, Worker):
                self._workers[key] = outcome
            elif isinstance(outcome, InvalidRequest):
                self._refusals[key] = outcome.message
                while len(self._refusals) > MAX_REFUSALS:
                    self._refusals.popitem(last=False)
        if isinstance(outcome, Worker):
            self._check_memory()
            compilation.future.set_result(outcome)
        else:
            compilation.future.set_exception(outcome)

    def _compile(self, structure: Structure, compilation: _Compilation) -> Worker:
        if compilation.started - compilation.asked >= MAX_WAIT_S:  # nobody waits any more
            raise Overloaded(RETRY, retry_after_s=RETRY_AFTER_S)
        try:
            check_text(structure.kind, structure.definition)
        except ValueError as error:
            raise _refused(str(error)) from None
        self.start()
        self._require_place()
        job = Job(structure.kind, structure.definition, structure.strict)
        worker = compilation.worker = self._server.spawn(job)
        message = self._server.first_message(worker)
        if compilation.evicted:
            raise Overloaded(RETRY, retry_after_s=RETRY_AFTER_S)
        if message is None:
            self._server.kill(worker)
            raise _refused(f"compiling it took longer than {COMPILE_TIMEOUT_S:g} s")
        if not message:
            raise _refused(self._server.explain(worker, compiling=True))
        kind, _, worker.memory_kib = REPLY.unpack_from(message)
        if kind == FAULT:
            raise _refused(message[REPLY.size :].decode("utf-8", "replace"))
        return worker

    def _require_place(self) -> None:
        """Make room for one more worker.

        Raises:
            Overloaded: all of them are in use.
        """
        with self._lock:
            if len(self._workers) + COMPILERS < MAX_WORKERS or self._drop_idle(IDLE_S):
                return
        raise Overloaded(
            "The server enforces too many different structures now. Please try again in a moment.",
            retry_after_s=RETRY_AFTER_S,
        )

    def _check_memory(self) -> None:
        """Keep the workers' memory in its bound: first those that nobody uses go."""
        ending: list[Worker] = []
        with self._lock:
            while sum(worker.memory_kib for worker in self._workers.values()) > MEMORY_KIB:
                if self._drop_idle(0.0):
                    continue
                key, worker = max(self._workers.items(), key=lambda item: item[1].memory_kib)
                del self._workers[key]
                ending.append(worker)
        for worker in ending:
            worker.end("it takes the most memory of all, and there is none left")

    def _drop_idle(self, idle_s: float) -> bool:
        """End the worker that nobody used for longest; False if all are in use; lock held."""
        now = time.monotonic()
        for key, worker in self._workers.items():
            if worker.fault is not None or (
                not worker.completions and now - worker.last_used >= idle_s
            ):
                del self._workers[key]
                worker.end("nobody used it")
                return True
        return False


def _key(structure: Structure) -> str:
    digest = hashlib.sha256(f"{structure.kind} {structure.strict}\0".encode())
    digest.update(structure.definition.encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _refused(fault: str) -> InvalidRequest:
    if fault.startswith("The structure"):
        return InvalidRequest(fault, param="structure")
    return InvalidRequest(f"The structure cannot be enforced: {fault}.", param="structure")


def _done(worker: Worker) -> Future[Worker]:
    future: Future[Worker] = Future()
    future.set_result(worker)
    return future


def _failed(error: ServeAppError) -> Future[Worker]:
    future: Future[Worker] = Future()
    future.set_exception(error)
    return future
