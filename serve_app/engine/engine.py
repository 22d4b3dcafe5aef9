"""START HERE: the asyncio side of the engine, an `LLMEngine` over one engine thread.

A request is checked and encoded here, its sequence goes to the thread by a queue, sampled
ids come back by the event loop of whoever asked. Text is made here, on the reader's side:
whole characters, stop strings matched across tokens, deltas that are ready together as one.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import format_exception
from typing import Any

import structlog

from serve_app.config import ApiConfig, EngineConfig, ModelConfig
from serve_app.engine.admission import Admission, Limits
from serve_app.engine.grammar.late import LateMatcher
from serve_app.engine.grammar.matcher import Worker
from serve_app.engine.grammar.pool import GrammarPool
from serve_app.engine.loop import EngineLoop
from serve_app.engine.model.build import assemble
from serve_app.engine.model.loading import load
from serve_app.engine.model.runner import Runner
from serve_app.engine.scheduler import Scheduler
from serve_app.engine.sequence import Sequence, Update
from serve_app.engine.stats import EngineStats, LoadReport, peak_rss_bytes
from serve_app.engine.stream import Stream, by_key, deliver, delta_interval_s
from serve_app.engine.text.completion import Completion
from serve_app.engine.text.prompt import EncodedRequest, PromptEncoder
from serve_app.engine.warm_up import warm_up
from serve_app.errors import EngineDead, EngineError, InvalidRequest
from serve_app.protocol import GenerationRequest, Prompt, PromptTokens, TokenDelta

log = structlog.get_logger()

# Far above any step; a thread that does not end by then hangs in a driver.
CLOSE_TIMEOUT_S = 60.0
# A completion that was cancelled keeps its place in a grammar's worker until the next step.
SPARE_SLOTS = 64


class Engine:
    """Continues prompts with one model; made by `Engine.load`.

    Args:
        runner: the model and its cache.
        scheduler: sized for that cache.
        encoder: the model's rules for prompts.
        max_context_tokens: prompt and completion together.
        limits: what is taken on before `Overloaded`.
        step_timeout_s: a step that takes longer hangs; the engine is dead then.
    """

    load_report: LoadReport

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        encoder: PromptEncoder,
        *,
        max_context_tokens: int,
        limits: Limits,
        step_timeout_s: float,
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
        self._loop = EngineLoop(
            scheduler,
            runner,
            deliver=self._deliver,
            died=self._died,
            step_timeout_s=step_timeout_s,
        )
        self._admission = Admission(self._loop, limits)
        self._keys = itertools.count()
        self._streams: dict[int, Stream] = {}
        self._lock = threading.Lock()  # nobody joins after all streams were failed
        self._dead: EngineDead | None = None

    @classmethod
    def load(
        cls,
        model_dir: Path,
        *,
        model: ModelConfig,
        engine: EngineConfig,
        num_gpus: float,
        num_cpus: float,
        api: ApiConfig,
    ) -> Engine:
        """Load a model directory, warm up and start; blocks for seconds to minutes.

        Args:
            model_dir: config, tokenizer and safetensors, as a Hub repository holds them.
            model: which dtype.
            engine: window, batch and cache.
            num_gpus: 0 computes on the CPU.
            num_cpus: threads of one step on the CPU.
            api: how much may wait before `Overloaded`.

        Raises:
            ModelLoadError: the files, the architecture, the device or the model's numbers are
                unusable; one sentence says which and what to do.
        """
        loaded = load(model_dir, model, num_gpus=num_gpus, num_cpus=num_cpus)
        peak_rss = {"load": peak_rss_bytes()}
        started = time.monotonic()
        assembly = assemble(loaded, engine, num_gpus=num_gpus)
        peak_rss["assemble"] = peak_rss_bytes()
        assemble_s = time.monotonic() - started
        self = cls(
            Runner(assembly.forward),
            Scheduler(
                kv_tokens=assembly.kv_tokens,
                max_batch_tokens=engine.max_batch_tokens,
                max_running_requests=engine.max_running_requests,
                prefill_chunk_tokens=assembly.prefill_chunk_tokens,
                prefix_cache=engine.prefix_cache,
                speculative_tokens=assembly.speculative_tokens,
            ),
            PromptEncoder(
                loaded.tokenizer,
                vocab_size=loaded.vocab_size,
                max_context_tokens=assembly.max_context_tokens,
                eos_token_ids=loaded.eos_token_ids,
                defaults=loaded.defaults if engine.generation_config == "auto" else {},
                reasoning=model.reasoning == "think",
                trust_templates=api.trust_request_chat_template,
            ),
            max_context_tokens=assembly.max_context_tokens,
            limits=Limits(
                engine.max_running_requests, api.max_queued_requests, api.max_queued_tokens
            ),
            step_timeout_s=engine.step_timeout_s,
        )
        conversations = self._encoder.conversations
        if conversations.has_template and not conversations.shows_tools():
            log.warning("template.hides_tools", repo_id=model.source)
        started = time.monotonic()
        warm_up(self._loop, self._encoder, key=next(self._keys))
        self.load_report = LoadReport(
            device=str(loaded.device),
            dtype=model.dtype,
            attention=assembly.attention,
            weights_bytes=loaded.weights_bytes,
            kv_bytes=assembly.kv_bytes,
            kv_tokens=assembly.kv_tokens,
            tokenizer_s=loaded.tokenizer_s,
            weights_s=loaded.weights_s,
            assemble_s=assemble_s - assembly.graphs_s,
            graphs_s=assembly.graphs_s,
            warm_up_s=time.monotonic() - started,
            peak_rss={**peak_rss, "warm_up": peak_rss_bytes()},
        )
        self._loop.start()
        return self

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Continue one prompt; see `LLMEngine.generate`.

        `completion_tokens` counts every sampled id up to the one that ended the completion,
        an end-of-sequence id included; ids sampled after a stop string are not counted.
        """
        self.check()
        self._admission.require(request.n)
        encoded = await self._encoder.encode(request)
        structure = request.sampling.structure
        grammars, client = self._grammars, request.client
        grammar = None if structure is None else await grammars.compile(structure, client)
        sequences, stream = self._submit(encoded, request, grammar)
        lead = sequences[0]
        running = {
            sequence.key: (index, sequence, self._completion(request, encoded, sequence))
            for index, sequence in enumerate(sequences)
        }
        try:
            while running:
                for key, updates in by_key(await stream.updates()).items():
                    if key not in running:
                        continue
                    index, sequence, completion = running[key]
                    delta = completion.take(updates)
                    if completion.finished:
                        del running[key]
                        self._forget(key)  # before the last delta: its reader may never come back
                    if delta is not None:
                        usage = replace(delta.usage, cached_tokens=lead.cached or 0)
                        yield replace(delta, index=index, usage=usage, timing=sequence.timing)
        finally:
            for sequence in sequences:
                self._forget(sequence.key)

    def prepare_grammars(self) -> None:
        """Have structured output ready before it is asked for; blocks for a second.

        A tokenizer that cannot be used for it is no error here: the request that asks is refused.
        """
        with suppress(InvalidRequest):
            self._grammars.start()

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
        """Whether the engine thread does its work."""
        return self._dead is None and self._loop.is_alive()

    def check(self) -> None:
        """Raise if the engine has stopped.

        Raises:
            EngineDead: it failed or was closed; the replica must be replaced.
        """
        if self._dead is not None:
            raise EngineDead(self._dead.message, cause=self._dead.details.get("cause"))
        if not self._loop.is_alive():
            raise EngineDead("The engine is not running.")

    def stats(self) -> EngineStats:
        """Return the present numbers."""
        return self._loop.stats()

    def close(self) -> None:
        """Stop the thread and fail what is open; calling it again does nothing."""
        self._end(EngineDead("The engine was closed."), "The engine was closed.")
        if self._loop.is_alive():
            self._loop.stop(CLOSE_TIMEOUT_S)
        self._grammars.close()
        self._encoder.close()

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
            self.check()
            tokens = len(encoded.tokens) + encoded.max_tokens
            self._admission.require(request.n, request.n * tokens)
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
                    request=sequences[0].key if index else -1,
                    reuse=index > 0 or request.sampling.prompt_logprobs is None,
                    parent=sequences[0] if index else None,
                    matcher=matchers[index] if matchers else None,
                )
                sequences.append(sequence)
                self._streams[sequence.key] = stream
                self._admission.add(sequence.key, sequence.limit)
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
        """Hand a step's updates to their readers; on the engine thread."""
        for key in deliver(self._streams, updates):
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
            stream.fail(EngineError(message))
