"""The asyncio side of an engine: requests in, deltas out, whatever makes the tokens.

A request is checked and encoded here and its sequences go to a `Loop`; sampled ids come back by
the event loop of whoever asked. Text is made here, on the reader's side: whole characters, stop
strings matched across tokens, deltas that are ready together as one. So prompts, answers, limits
and errors are the same with every engine.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from traceback import format_exception
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import structlog

from serve_app.engine.admission import Admission, Limits, Load
from serve_app.engine.grammar.late import LateMatcher
from serve_app.engine.grammar.matcher import Worker
from serve_app.engine.grammar.pool import GrammarPool
from serve_app.engine.sequence import Sequence, Update
from serve_app.engine.stats import EngineStats, LoadReport
from serve_app.engine.stream import Stream, by_key, deliver, delta_interval_s
from serve_app.engine.text.completion import Completion
from serve_app.engine.text.prompt import EncodedRequest, PromptEncoder
from serve_app.errors import (
    EngineDead,
    InvalidRequest,
    ModelNotFound,
    ServeAppError,
)
from serve_app.protocol import GenerationRequest, Prompt, PromptTokens, Structure, TokenDelta

log = structlog.get_logger()

# Far above any step; a thread that does not end by then hangs in a driver.
CLOSE_TIMEOUT_S = 60.0
# A completion that was cancelled keeps its place in a grammar's worker until the next step.
SPARE_SLOTS = 64


class Loop(Load, Protocol):
    """What makes tokens of sequences, on a thread of its own; any thread calls it."""

    def submit(self, sequence: Sequence) -> None:
        """Hand over a new sequence; keys must ascend."""
        ...

    def cancel(self, key: int) -> None:
        """Drop a sequence within one step; one that is over is no error."""
        ...

    def is_alive(self) -> bool:
        """Return whether it does its work."""
        ...

    def stop(self, timeout_s: float) -> bool:
        """End it after its step; return whether it has ended in time."""
        ...


L = TypeVar("L", bound=Loop)
Deliver: TypeAlias = Callable[[list[Update]], None]
Died: TypeAlias = Callable[[Exception], None]


class FrontEnd(Generic[L]):
    """An `LLMEngine` over a loop.

    Args:
        loop: makes the loop, of what takes each step's updates and what is called once when it
            can do nothing more.
        encoder: the model's rules for prompts.
        max_context_tokens: prompt and completion together.
        limits: what is taken on before `Overloaded`.
    """

    load_report: LoadReport
    adapters: frozenset[str] = frozenset()  # names of what a request may be answered with

    def __init__(
        self,
        loop: Callable[[Deliver, Died], L],
        encoder: PromptEncoder,
        *,
        max_context_tokens: int,
        limits: Limits,
    ) -> None:
        self.max_context_tokens = max_context_tokens
        self.vocab_size = encoder.vocab_size
        self._encoder = encoder
        self._grammars = GrammarPool(
            encoder.dump_tokenizer,
            vocab_size=encoder.vocab_size,
            eos_token_ids=encoder.eos_token_ids,
            slots=2 * limits.open + SPARE_SLOTS,
        )
        self._loop = loop(self._deliver, self._died)
        self._admission = Admission(self._loop, limits)
        self._keys = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._lock = threading.Lock()  # nobody joins after all streams were failed
        self._dead: EngineDead | None = None

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Continue one prompt; see `LLMEngine.generate`.

        `completion_tokens` counts every sampled id up to the one that ended the completion,
        an end-of-sequence id included; ids sampled after a stop string are not counted.
        """
        self.check()
        if request.adapter and request.adapter not in self.adapters:
            raise ModelNotFound("this replica has no such adapter", param="model")
        # First without its tokens: overload shall not cost the encoding of a prompt.
        self._admission.require(request.n, client=request.client, priority=request.priority)
        encoded = await self._encoder.encode(request)
        self._check(encoded)
        sequences, stream = self._submit(encoded, request, await self._grammar(request))
        lead = sequences[0]
        running = {
            sequence.key: (index, sequence, self._completion(request, encoded, sequence))
            for index, sequence in enumerate(sequences)
        }
        try:
            while running:
                for key, updates in by_key(await stream.updates()).items():
                    if key not in running:  # ended at a stop string, of which the loop knows late
                        continue
                    index, sequence, completion = running[key]
                    delta = completion.take(updates)
                    if completion.finished:
                        del running[key]
                        self._forget(key)  # before the last delta: its reader may never come back
                    if delta is not None:
                        # The others' copies of the lead's prompt are no hits.
                        usage = replace(delta.usage, cached_tokens=lead.cached or 0)
                        yield replace(delta, index=index, usage=usage, timing=sequence.timing)
        finally:
            for sequence in sequences:
                self._forget(sequence.key)

    def prepare_grammars(self) -> None:
        """Have structured output ready before it is asked for; blocks for a second.

        What prevents it is no error here: the request that asks is refused.
        """
        try:
            self._grammars.start()
        except InvalidRequest:
            pass  # logged with the tokenizer's fault
        except OSError as error:  # no process, no descriptor, no memory
            log.error("grammar.failed", cause=str(error))

    def warn_of_template(self, source: str) -> None:
        """Log a chat template that shows no tools to the model.

        Args:
            source: the model's repository or directory.
        """
        conversations = self._encoder.conversations
        if conversations.has_template and not conversations.shows_tools():
            log.warning("template.hides_tools", repo_id=source)

    async def ready(self) -> bool:
        """Return whether a request sent now would be answered."""
        return self.alive

    async def tokenize(self, prompt: Prompt) -> PromptTokens:
        """Return a prompt's tokens; see `LLMEngine.tokenize`."""
        self._admission.require(1)
        return PromptTokens(tuple(await self._encoder.tokenize(prompt)), self.max_context_tokens)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Return the text of ids; see `LLMEngine.detokenize`."""
        self._admission.require(1)
        return await self._encoder.detokenize(token_ids)

    async def token_strings(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """Return each id as the vocabulary writes it; see `LLMEngine.token_strings`."""
        return await self._encoder.strings(token_ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        """Return the tokenizer's settings; see `LLMEngine.tokenizer_info`."""
        return self._encoder.tokenizer_info()

    @property
    def alive(self) -> bool:
        """Whether the engine does its work."""
        return self._dead is None and self._loop.is_alive()

    def check(self) -> None:
        """Raise if the engine has stopped.

        Raises:
            EngineDead: it failed or was closed; the replica must be replaced. `untouched` in its
                details: nothing of what was asked for was begun, so it cannot be at fault.
        """
        if self._dead is not None:
            cause = self._dead.details.get("cause")
            raise EngineDead(self._dead.message, cause=cause, untouched=True)
        if not self._loop.is_alive():
            raise EngineDead("The engine is not running.", untouched=True)

    def stats(self) -> EngineStats:
        """Return the present numbers."""
        return self._loop.stats()

    def close(self) -> None:
        """Stop the loop and fail what is open; calling it again does nothing."""
        self._end(EngineDead("The engine was closed."), "The engine was closed.")
        if self._loop.is_alive():
            self._loop.stop(CLOSE_TIMEOUT_S)
        self._grammars.close()
        self._encoder.close()

    def _check(self, encoded: EncodedRequest) -> None:
        """Raise `InvalidRequest` for what this engine cannot do and others can."""

    async def _grammar(self, request: GenerationRequest) -> Worker | None:
        """Compile a request's structure, if it has one."""
        structure = request.sampling.structure
        try:
            return None if structure is None else await self._compile(structure, request.client)
        except InvalidRequest:
            self.check()  # closing ends compilations too, which says nothing of the structure
            raise

    async def _compile(self, structure: Structure, client: str) -> Worker | None:
        """Return what walks a structure for the loop; None where the loop has its own way."""
        return await self._grammars.compile(structure, client)

    def _completion(
        self, request: GenerationRequest, encoded: EncodedRequest, sequence: Sequence
    ) -> Completion:
        params = request.sampling
        return Completion(
            self._encoder.decoder(params),
            stop=params.stop,
            prompt_tokens=len(encoded.tokens),
            context=encoded.tokens if encoded.continues else (),
            piece=self._encoder.piece,
            scores_prompt=sequence.sampling.prompt_logprobs is not None,
            include_stop=params.include_stop,
            stop_strings=encoded.stop_strings,
            thinking=encoded.thinking if params.split_thoughts else None,
            shown_prompt=encoded.tokens if params.return_prompt_ids else (),
        )

    def _submit(
        self, encoded: EncodedRequest, request: GenerationRequest, grammar: Worker | None
    ) -> tuple[list[Sequence], Stream]:
        """Queue one sequence a completion; all but the first wait for its prompt."""
        interval = lambda: delta_interval_s(len(self._streams))  # noqa: E731
        stream = Stream(asyncio.get_running_loop(), interval)
        sequences: list[Sequence] = []
        with self._lock:
            # Dead since the prompt was encoded, it would never end a stream that joins now.
            self.check()
            tokens = len(encoded.tokens) + encoded.max_tokens
            self._admission.require(request.n, request.n * tokens, request.client, request.priority)
            thoughts = self._encoder.thoughts_of(encoded)
            begin = None if thoughts is None else partial(LateMatcher, thoughts=thoughts)
            matchers = grammar.open(request.n, begin) if grammar else []
            for index in range(request.n):
                sequence = Sequence(
                    key=next(self._keys),
                    tokens=list(encoded.tokens),
                    prompt_tokens=len(encoded.tokens),
                    max_tokens=encoded.max_tokens,
                    sampling=encoded.sampling.of_completion(index),
                    client=request.client,
                    adapter=request.adapter,
                    priority=request.priority,
                    request=sequences[0].key if index else -1,
                    reuse=index > 0 or request.sampling.prompt_logprobs is None,
                    parent=sequences[0] if index else None,
                    matcher=matchers[index] if matchers else None,
                    thinking=encoded.thinking,
                )
                sequences.append(sequence)
                self._streams[sequence.key] = stream
                self._admission.add(
                    sequence.key, sequence.limit, sequence.client, sequence.priority
                )
            # Last, and all of them: a loop that begins at once must find every stream in its place.
            for sequence in sequences:
                self._loop.submit(sequence)
        return sequences, stream

    def _forget(self, key: int) -> None:
        """Drop a stream; its sequence, if it still runs, ends within one step."""
        self._admission.drop(key)
        stream = self._streams.pop(key, None)
        if stream is not None and key not in stream.over:
            self._loop.cancel(key)

    def _deliver(self, updates: list[Update]) -> None:
        """Hand a step's updates to their readers; on the loop's thread."""
        for key in deliver(self._streams, updates):
            self._forget(key)

    def _fail(self, key: int, error: ServeAppError) -> None:
        """End the request of a sequence with an error; on the loop's thread."""
        if (stream := self._streams.get(key)) is not None:
            stream.fail(error)
        self._forget(key)

    def _died(self, error: Exception) -> None:
        cause = f"{type(error).__name__}: {error}"
        log.error("engine.died", cause=cause, traceback="".join(format_exception(error)))
        self._end(
            EngineDead("The engine stopped after an internal error.", cause=cause),
            "Generation failed: the engine stopped after an internal error.",
        )

    def _end(self, dead: EngineDead, message: str) -> None:
        """Refuse all from now on and fail every open request once."""
        with self._lock:
            if self._dead is not None:
                return
            self._dead = dead
            streams, self._streams = set(self._streams.values()), {}
        for stream in streams:
            stream.fail(EngineDead(message))
