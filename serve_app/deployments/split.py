"""Two versions behind one ingress: the one that serves, and a canary that gets a share.

Without a canary this is the serving version's own engine: a request passes through nothing. A
request that the canary fails before its first token is the canary's error and not the client's:
the version that serves answers it.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import structlog
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve_app.deployments import canary as store
from serve_app.deployments.canary import Canary
from serve_app.deployments.conversation import opening
from serve_app.deployments.track import Track, TrackMetrics
from serve_app.errors import RequestCancelled, RequestError, ServeAppError
from serve_app.protocol import (
    GenerationRequest,
    LLMEngine,
    Prompt,
    PromptTokens,
    TokenDelta,
)

log = structlog.get_logger()

LOOK_S = 1.0  # between two looks at the share
READY_S = 5.0  # between two questions whether the canary would answer
COPIES = 32  # of requests, under way at a time in one ingress


class Split:
    """An `LLMEngine` of an application and, while there is one, of its canary.

    Args:
        stable: the version that serves.
        connect: returns a canary's engine.
        application: Serve's name of the version that serves.
        ingress: the id of this process, under which it says what it has seen.
        metrics: of both versions, while there is a canary.
        chance: returns a number from 0 to 1, drawn anew.
    """

    def __init__(
        self,
        stable: LLMEngine,
        connect: Callable[[Canary], Awaitable[LLMEngine]],
        *,
        application: str,
        ingress: str,
        metrics: TrackMetrics,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._stable = stable
        self._application = application
        self._ingress = ingress
        self._connect = connect
        self._metrics = metrics
        self._chance = chance
        self._trial: _Trial | None = None
        self._copies: set[asyncio.Task[None]] = set()

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Continue one prompt by one of the versions; see `LLMEngine.generate`."""
        trial = self._trial
        if trial is None:
            return self._stable.generate(request)
        if trial.takes(request, self._chance):
            return self._by_canary(trial, request)
        return self._by_stable(trial, request)

    async def ready(self) -> bool:
        """Return whether the version that serves would answer."""
        return await self._stable.ready()

    async def tokenize(self, prompt: Prompt) -> PromptTokens:
        """Return a prompt's tokens, as the version that serves reads it."""
        return await self._stable.tokenize(prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Return the text of ids; see `LLMEngine.detokenize`."""
        return await self._stable.detokenize(token_ids)

    async def token_strings(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """Return each id as the vocabulary writes it; see `LLMEngine.token_strings`."""
        return await self._stable.token_strings(token_ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        """Return the tokenizer's settings; see `LLMEngine.tokenizer_info`."""
        return await self._stable.tokenizer_info()

    async def run(self) -> None:
        """Follow what the command says, and say what was seen, until cancelled."""
        while True:
            try:
                with suppress(RayError, RayServeException):  # looked at again in a second
                    await self.look()
            except Exception:
                self._end_trial()  # of a share that nobody understands the canary gets nothing
                raise
            await asyncio.sleep(LOOK_S)

    async def look(self) -> None:
        """Take over the present share, and publish what was seen.

        Raises:
            RayError: the cluster does not answer.
            RayServeException: the canary is not there yet, or not any more.
        """
        canary = await asyncio.to_thread(store.read, self._application)
        trial = self._trial
        if canary is None or canary.idle:
            self._end_trial()
            return
        if trial is None or trial.canary != canary:
            if trial is not None and trial.canary.trial == canary.trial:
                engine = trial.tried.engine
            else:
                self._trial = None  # another canary's
                engine = await self._connect(canary)
            trial = _Trial(canary, self._stable, engine, self._metrics, trial)
            self._trial = trial
        await trial.ask_ready()
        self._metrics.share(canary.share if trial.ready else 0.0)
        await asyncio.to_thread(
            store.publish,
            self._application,
            self._ingress,
            canary,
            ready=trial.ready,
            stable=trial.stable.snapshot(),
            tried=trial.tried.snapshot(),
        )

    def _end_trial(self) -> None:
        if self._trial is not None:
            self._metrics.share(0.0)
        self._trial = None

    async def _by_stable(
        self, trial: _Trial, request: GenerationRequest
    ) -> AsyncGenerator[TokenDelta, None]:
        copied = not trial.copies(request, self._chance)
        async with aclosing(trial.stable.generate(request)) as deltas:
            async for delta in deltas:
                if not copied:  # only now it is known to be a request that can be answered
                    copied = True
                    self._copy(trial, request)
                yield delta

    async def _by_canary(
        self, trial: _Trial, request: GenerationRequest
    ) -> AsyncGenerator[TokenDelta, None]:
        begun = refused = False
        try:
            async with aclosing(trial.tried.generate(request)) as deltas:
                async for delta in deltas:
                    begun = True
                    yield delta
                return
        except RequestCancelled:
            raise
        except ServeAppError as error:
            if begun:
                raise
            refused = isinstance(error, RequestError)
            log.warning("canary.failed", request_id=request.request_id, code=error.code)
        async with aclosing(trial.stable.generate(request)) as deltas:
            async for delta in deltas:
                if refused:  # what the other version answers is no fault of the client
                    refused = False
                    trial.tried.fail(answered=False)
                yield delta

    def _copy(self, trial: _Trial, request: GenerationRequest) -> None:
        if len(self._copies) >= COPIES:
            trial.tried.seen.dropped += 1
            return
        task = asyncio.create_task(_drop(trial.tried, request))
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)


async def _drop(track: Track, request: GenerationRequest) -> None:
    """Let the canary answer a copy for nobody."""
    copy = replace(request, request_id=f"{request.request_id}-shadow")
    try:
        async with aclosing(track.generate(copy, copy=True)) as deltas:
            async for _ in deltas:
                pass
    except RequestError:
        track.fail(answered=False)  # the other version has answered it
    except ServeAppError:
        pass  # counted


class _Trial:
    """A canary in one step, beside the version that serves."""

    def __init__(
        self,
        canary: Canary,
        stable: LLMEngine,
        engine: LLMEngine,
        metrics: TrackMetrics,
        before: _Trial | None,
    ) -> None:
        self.canary = canary
        self.stable = Track("stable", stable, metrics)
        self.tried = Track("canary", engine, metrics)
        self.ready = False
        self._asked_at = 0.0
        if before is not None and before.tried.engine is engine:
            self.ready, self._asked_at = before.ready, before._asked_at

    def takes(self, request: GenerationRequest, chance: Callable[[], float]) -> bool:
        """Return whether the canary is to answer a request."""
        if not self._can(request):
            return False
        key = sticky_key(self.canary.sticky, request)
        if key is None:
            return chance() < self.canary.share
        return place(self.canary.trial, key) < self.canary.share

    def copies(self, request: GenerationRequest, chance: Callable[[], float]) -> bool:
        """Return whether the canary is to get a copy of a request."""
        return self.canary.shadow > 0 and self._can(request) and chance() < self.canary.shadow

    async def ask_ready(self) -> None:
        """Ask from time to time whether the canary would answer; until it does it gets nothing."""
        if time.monotonic() - self._asked_at >= (READY_S if self.ready else 0.0):
            self.ready = await self.tried.engine.ready()
            self._asked_at = time.monotonic()

    def _can(self, request: GenerationRequest) -> bool:
        return self.ready and request.adapter in {"", *self.canary.adapters}


def sticky_key(sticky: str, request: GenerationRequest) -> str | None:
    """Return what a request has in common with those that go to the same version.

    A conversation is known by who asks, and by its `opening`.

    Args:
        sticky: see `Canary`.
        request: of a client.

    Returns:
        None if each request is a case of its own.
    """
    if not sticky:
        return None
    if sticky == "client":
        return request.client
    return f"{request.client}\n{opening(request.prompt)}"


def place(trial: str, key: str) -> float:
    """Return where a key stands between 0 and 1; below the share it goes to the canary.

    So a conversation that has come to a canary stays there while the share grows.
    """
    digest = hashlib.blake2b(f"{trial}\n{key}".encode(errors="surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest()) / 2**64
