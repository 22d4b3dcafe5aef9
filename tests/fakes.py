"""Test doubles of the seams: an engine that plays a script, and Ray's key-value store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ray.exceptions import RayError

from serve_app.protocol import (
    FinishReason,
    GenerationRequest,
    Logprob,
    Prompt,
    PromptTokens,
    TokenDelta,
    TokenLogprobs,
    TokenPrompt,
    Usage,
)


@dataclass(frozen=True)
class Pause:
    """Wait; for ever if no seconds are given."""

    seconds: float | None = None


@dataclass(frozen=True)
class Thought:
    """Text of the model's thoughts."""

    text: str


Step: TypeAlias = str | Thought | Pause | BaseException
Script: TypeAlias = Sequence[Step]


@dataclass
class FakeEngine:
    """An `LLMEngine` that plays a script: texts are deltas of one token, errors are raised.

    Completions of one request play it in step. Token `i` of the vocabulary is the word `i`.

    Args:
        script: the same steps for each request, or a function from a request to its steps.
        prompt_tokens: what each prompt counts.
        finish_reason: on the last delta; None ends the stream without one.
        max_context_tokens: what `tokenize` says of the window.
        is_ready: what `ready` says, or an error that it raises, or a pause before True.
    """

    script: Script | Callable[[GenerationRequest], Script] = ("Hello", ",", " world")
    prompt_tokens: int = 5
    max_context_tokens: int = 512
    finish_reason: FinishReason | None = FinishReason.STOP
    is_ready: bool | BaseException | Pause = True
    requests: list[GenerationRequest] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    closed_early: list[str] = field(default_factory=list)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Play the script; `running` and `closed_early` say what became of it."""
        self.requests.append(request)
        self.running.add(request.request_id)
        ended = False
        try:
            steps = list(self.script(request) if callable(self.script) else self.script)
            texts = [step for step in steps if isinstance(step, str | Thought)]
            sent = 0
            for step in steps:
                if isinstance(step, str | Thought):
                    sent += 1
                    last = sent == len(texts) and step is steps[-1]
                    for index in range(request.n):
                        ended = last and index == request.n - 1
                        yield self._delta(request, step, sent, index=index, last=last)
                else:
                    await self._do(step)
            ended = True
        except Exception:
            ended = True
            raise
        finally:
            self.running.discard(request.request_id)
            if not ended:
                self.closed_early.append(request.request_id)

    async def ready(self) -> bool:
        """Answer as scripted."""
        if isinstance(self.is_ready, bool):
            return self.is_ready
        await self._do(self.is_ready)
        return True

    async def tokenize(self, prompt: Prompt) -> PromptTokens:
        """Return as many ids as `prompt_tokens` says; a prompt of ids comes back as it is."""
        if isinstance(prompt, TokenPrompt):
            return PromptTokens(prompt.token_ids, self.max_context_tokens)
        return PromptTokens(tuple(range(self.prompt_tokens)), self.max_context_tokens)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Return the ids as words."""
        return " ".join(map(str, token_ids))

    async def token_strings(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """Return the ids as a vocabulary would."""
        return tuple(f"token{token}" for token in token_ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        """Return the settings of no tokenizer."""
        return {"tokenizer_class": "Fake", "eos_token": "</s>", "chat_template": None}

    def _delta(
        self,
        request: GenerationRequest,
        step: str | Thought,
        sent: int,
        *,
        index: int,
        last: bool,
    ) -> TokenDelta:
        alternatives = request.sampling.logprobs
        text = step.text if isinstance(step, Thought) else step
        logprobs = () if alternatives is None else (_logprobs(sent, text, alternatives),)
        first = sent == 1 and index == 0
        shown = request.sampling.return_prompt_ids and sent == 1
        return TokenDelta(
            text="" if isinstance(step, Thought) else text,
            reasoning=text if isinstance(step, Thought) else "",
            prompt_token_ids=tuple(range(self.prompt_tokens)) if shown else (),
            token_ids=(sent,),
            usage=Usage(prompt_tokens=self.prompt_tokens, completion_tokens=sent, cached_tokens=2),
            finish_reason=self.finish_reason if last else None,
            index=index,
            logprobs=logprobs,
            prompt_logprobs=self._prompt_logprobs(request) if first else (),
        )

    def _prompt_logprobs(self, request: GenerationRequest) -> tuple[TokenLogprobs, ...]:
        alternatives = request.sampling.prompt_logprobs
        if alternatives is None:
            return ()
        ids = (
            request.prompt.token_ids
            if isinstance(request.prompt, TokenPrompt)
            else tuple(range(self.prompt_tokens))
        )
        rest = (_logprobs(token, f" {token}", alternatives) for token in ids[1:])
        return (TokenLogprobs(None), *rest)

    async def _do(self, step: Pause | BaseException) -> None:
        if isinstance(step, BaseException):
            raise step
        if step.seconds is None:
            await asyncio.Event().wait()
        else:
            await asyncio.sleep(step.seconds)


def _logprobs(token: int, text: str, alternatives: int) -> TokenLogprobs:
    """Return a token that is the most likely one, and others after it."""
    chosen = Logprob(token, text, text.encode(), -0.125)
    others = (
        Logprob(token + n, f"{text}{n}", f"{text}{n}".encode(), -1.0 - n) for n in range(1, 99)
    )
    return TokenLogprobs(chosen, (chosen, *others)[:alternatives])


class FakeKeyValueStore:
    """Ray's key-value store, as far as `serve_app.cluster.kv` uses it; atomic as that one is."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.is_lost = False
        self._lock = threading.Lock()

    def _internal_kv_put(self, key, value, overwrite, namespace):
        self._answer()
        with self._lock:
            known = key in self.held
            if overwrite or not known:
                self.held[key] = value.encode()
            return known

    def _internal_kv_get(self, key, namespace):
        self._answer()
        return self.held.get(key)

    def _internal_kv_del(self, key, namespace):
        self._answer()
        self.held.pop(key, None)

    def _internal_kv_list(self, prefix, namespace):
        self._answer()
        return [key.encode() for key in list(self.held) if key.startswith(prefix)]

    def _answer(self):
        if self.is_lost:
            raise RayError("no answer")
