"""AsyncLLM on a thread and an event loop of its own, as the front end's loop.

A task for each sequence reads vLLM's stream of it; cancelling the task aborts the request there.
vLLM's own processes compute. When they are gone, or no step ends for too long, every open request
fails once and the replica is replaced: vLLM has no smaller unit of failure.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent import futures
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import structlog
from vllm import AsyncEngineArgs
from vllm.exceptions import VLLMClientError
from vllm.inputs import TokensPrompt
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from serve_app.engine.drain import DrainMeter, DrainRate
from serve_app.engine.sequence import Sequence, Update
from serve_app.engine.stats import EngineStats
from serve_app.engine.text.reasoning import Thinking
from serve_app.engine.vllm.adapters import Loras
from serve_app.engine.vllm.counts import Counts
from serve_app.engine.vllm.guard import Guard
from serve_app.engine.vllm.outputs import updates_of
from serve_app.engine.vllm.requests import params_of
from serve_app.errors import EngineError, InvalidRequest, ServeAppError
from serve_app.redaction import sanitise
from serve_app.watchdog import Watchdog

log = structlog.get_logger()

LOOK_S = 0.5  # between two looks at whether vLLM's processes are there
WORDS = 300  # characters of what vLLM says
T = TypeVar("T")


class VllmLoop:
    """Runs AsyncLLM.

    Args:
        arguments: of vLLM; its processes start here, which takes seconds to minutes.
        deliver: takes the updates of each output, on the loop's thread.
        died: called once, when vLLM can do nothing more.
        fail: ends one sequence with an error.
        step_timeout_s: a step that takes longer hangs.
        loras: adapters; each is read once before the first request.

    Raises:
        Exception: whatever vLLM raises over a model that it cannot load.
    """

    def __init__(
        self,
        arguments: AsyncEngineArgs,
        *,
        deliver: Callable[[list[Update]], None],
        died: Callable[[Exception], None],
        fail: Callable[[int, ServeAppError], None],
        step_timeout_s: float,
        loras: Loras,
    ) -> None:
        self._deliver = deliver
        self._died = died
        self._fail = fail
        self._loras = loras
        self._counts = Counts()
        self._drain = DrainMeter()
        self._open: dict[int, Sequence] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._is_over = False
        self._events = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._events.run_forever, name="vllm", daemon=True)
        self._watchdog = Watchdog(
            "vllm-watchdog", working=self._working, limit_s=step_timeout_s, alarm=self._hangs
        )
        self._guard = Guard()
        self._thread.start()
        try:
            self.llm = self._guarded(self._make(arguments))
        except BaseException:
            self._events.call_soon_threadsafe(self._events.stop)
            self._guard.close()
            raise
        cache = self.llm.vllm_config.cache_config
        self.kv_tokens = int(cache.num_gpu_blocks * cache.block_size)

    def start(self) -> None:
        """Begin to look after vLLM's processes."""
        self._watchdog.start()
        asyncio.run_coroutine_threadsafe(self._look(), self._events)

    def stop(self, timeout_s: float) -> bool:
        """End vLLM's processes and the thread; return whether it has ended in time."""
        self._is_over = True
        self._watchdog.stop()
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(self._end(), self._events).result(timeout_s)
        self._events.call_soon_threadsafe(self._events.stop)
        self._thread.join(timeout_s)
        self._guard.close()
        return not self._thread.is_alive()

    def submit(self, sequence: Sequence) -> None:
        """Hand over a new sequence."""
        self._open[sequence.key] = sequence
        self._events.call_soon_threadsafe(self._begin, sequence)

    def cancel(self, key: int) -> None:
        """Abort a sequence; one that is over is no error."""
        if self._open.pop(key, None) is not None:
            self._events.call_soon_threadsafe(self._abort, key)

    def is_alive(self) -> bool:
        """Return whether vLLM's processes do their work."""
        return not self._is_over and self._thread.is_alive() and not self.llm.errored

    @property
    def waiting(self) -> int:
        """Requests that found no place in vLLM's batch after its last step."""
        return min(self._counts.waiting, len(self._open))

    def stats(self) -> EngineStats:
        """Return the present numbers; vLLM's own are of its last step."""
        return self._counts.stats(list(self._open.values()), self.kv_tokens)

    def drain_rate(self) -> DrainRate | None:
        """Return how fast requests finish; None before two have."""
        return self._drain.rate()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the loop and wait for it; not on the loop's own thread."""
        return asyncio.run_coroutine_threadsafe(work, self._events).result()

    def run_alone(self, sequence: Sequence) -> list[Update]:
        """Run one sequence to its end and return its updates.

        Raises:
            RuntimeError: vLLM cannot do it; says why.
        """
        try:
            return self.run(self._collect(sequence))
        except (VLLMClientError, EngineDeadError) as error:
            raise RuntimeError(sanitise(str(error), limit=WORDS)) from error

    def _guarded(self, work: Coroutine[Any, Any, T]) -> T:
        """Run what starts processes, and have each guarded as soon as it is there."""
        known = {process.pid for process in multiprocessing.active_children()}
        working = asyncio.run_coroutine_threadsafe(work, self._events)
        while True:
            is_done = working.done()
            new = {process.pid for process in multiprocessing.active_children()} - known
            self._guard.watch(pid for pid in new if pid is not None)
            known |= new
            if is_done:
                return working.result()
            futures.wait([working], timeout=LOOK_S)

    async def _make(self, arguments: AsyncEngineArgs) -> AsyncLLM:
        llm = AsyncLLM.from_engine_args(arguments, stat_loggers=[lambda *_args: self._counts])
        for request in self._loras.requests.values():
            await llm.add_lora(request)
        return llm

    async def _collect(self, sequence: Sequence) -> list[Update]:
        return [update async for updates in self._updates(sequence) for update in updates]

    def _begin(self, sequence: Sequence) -> None:
        if sequence.key in self._open:  # not cancelled meanwhile
            task = self._events.create_task(self._follow(sequence))
            self._tasks[sequence.key] = task
            task.add_done_callback(lambda _task: self._tasks.pop(sequence.key, None))

    def _abort(self, key: int) -> None:
        if task := self._tasks.get(key):
            task.cancel()

    async def _follow(self, sequence: Sequence) -> None:
        """Read one sequence's stream to its end."""
        try:
            async for updates in self._updates(sequence):
                self._deliver(updates)
        except EngineDeadError as error:
            self._die(error)
        except VLLMClientError as error:
            self._fail(sequence.key, _refusal(sequence, error))
        except Exception as error:  # noqa: BLE001 (one request's; vLLM goes on)
            cause = f"{type(error).__name__}: {error.__cause__ or error}"
            log.warning("engine.request_failed", cause=cause)
            self._fail(sequence.key, EngineError("Generation failed: vLLM gave the request up."))
        finally:
            self._open.pop(sequence.key, None)

    async def _updates(self, sequence: Sequence) -> AsyncIterator[list[Update]]:
        stream = self.llm.generate(
            TokensPrompt(prompt_token_ids=sequence.tokens),
            params_of(sequence.sampling, sequence.max_tokens),
            str(sequence.key),
            lora_request=self._loras.request(sequence.adapter),
            priority=sequence.priority,
            reasoning_ended=sequence.thinking is not Thinking.OPEN,
        )
        async with aclosing(stream):
            async for output in stream:
                if output.finished:
                    self._open.pop(sequence.key, None)
                    self._drain.note(sequence.limit)
                yield updates_of(output, sequence)

    async def _look(self) -> None:
        """Notice that vLLM's processes are gone while nobody asks them for anything."""
        while not self._is_over:
            if self.llm.errored:
                self._die(EngineDeadError())
            await asyncio.sleep(LOOK_S)

    def _working(self) -> int | None:
        return self._counts.steps if self._open else None

    def _hangs(self, seconds: float) -> None:
        log.error(
            "engine.hung",
            seconds=round(seconds, 1),
            phase="compute",
            rows=len(self._open),
            tokens=0,
            stack="",
        )
        self._die(TimeoutError(f"vLLM has ended no step for {seconds:.0f} s"))

    def _die(self, error: Exception) -> None:
        if not self._is_over:
            self._is_over = True
            self._died(error)

    async def _end(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self.llm.shutdown()


def _refusal(sequence: Sequence, error: Exception) -> InvalidRequest:
    words = sanitise(str(error), limit=WORDS)
    if sequence.sampling.structure is not None:
        return InvalidRequest(f"The structure cannot be enforced: {words}", param="structure")
    return InvalidRequest(f"The engine does not take the request: {words}")
