"""The status page at `/` and the numbers behind it at `/status`.

The page is one file without outside resources; it holds no data itself. It asks `/status`,
`/access` and the API as any client does, with the visitor's API key where keys are set.
"""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.sse import dump
from serve_app.errors import ServeAppError
from serve_app.protocol import GenerationRequest, LLMEngine, Prompt, PromptTokens, TokenDelta

Replicas = Callable[[], Awaitable[list[dict[str, Any]] | None]]
PAGE = Path(__file__).with_name("page.html")
RATE_WINDOW_S = 10
_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


class Board:
    """An `LLMEngine` that counts what passes through it.

    Args:
        engine: answers.
        about: what is served: model, commit, version.
        replicas: returns what each replica is at, None for unknown; see `read_replicas`.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        engine: LLMEngine,
        about: dict[str, Any],
        replicas: Replicas | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._about = about
        self._replicas = replicas
        self._clock = clock
        self._started = clock()
        self._waiting = self._running = self._finished = self._failed = self._tokens = 0
        self._seconds: deque[tuple[int, int]] = deque(maxlen=RATE_WINDOW_S + 1)
        self._page = PAGE.read_bytes()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Pass deltas on and count them; see `LLMEngine.generate`."""
        self._waiting += 1
        begun = False
        deltas: Any = self._engine.generate(request)
        open_completions = request.n
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    if not begun:
                        begun = True
                        self._waiting -= 1
                        self._running += 1
                    self._count(len(delta.token_ids))
                    if delta.finish_reason is not None:
                        open_completions -= 1
                        # Before the last delta is handed over: its reader may not come back.
                        self._finished += open_completions == 0
                    yield delta
        except ServeAppError:
            self._failed += 1
            raise
        finally:
            self._running -= begun
            self._waiting -= not begun

    async def ready(self) -> bool:
        """See `LLMEngine.ready`."""
        return await self._engine.ready()

    async def tokenize(self, prompt: Prompt) -> PromptTokens:
        """See `LLMEngine.tokenize`."""
        return await self._engine.tokenize(prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """See `LLMEngine.detokenize`."""
        return await self._engine.detokenize(token_ids)

    def routes(self) -> list[Route]:
        """Return the page and its numbers."""
        return [Route("/", self._show), Route("/status", self._status)]

    def numbers(self) -> dict[str, Any]:
        """Return what is served and how much, as plain data; tokens/s over ten seconds.

        A request waits until its first token and runs after it.
        """
        now = self._clock()
        recent = sum(tokens for second, tokens in self._seconds if second >= now - RATE_WINDOW_S)
        return {
            **self._about,
            "uptime_s": round(now - self._started, 1),
            "requests": {
                "waiting": self._waiting,
                "running": self._running,
                "finished": self._finished,
                "failed": self._failed,
            },
            "generation_tokens": self._tokens,
            "tokens_per_s": round(recent / min(RATE_WINDOW_S, max(1.0, now - self._started)), 1),
        }

    def _count(self, tokens: int) -> None:
        self._tokens += tokens
        second = int(self._clock())
        if self._seconds and self._seconds[-1][0] == second:
            tokens += self._seconds.pop()[1]
        self._seconds.append((second, tokens))

    async def _show(self, _request: Request) -> Response:
        return Response(
            self._page,
            media_type="text/html; charset=utf-8",
            headers={"content-security-policy": _policy(self._page), "cache-control": "no-cache"},
        )

    async def _status(self, _request: Request) -> Response:
        replicas = await self._replicas() if self._replicas else None
        return Response(
            dump({**self.numbers(), "replicas": replicas}), media_type="application/json"
        )


def _policy(page: bytes) -> str:
    """Allow the page's own script and nothing else."""
    scripts = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"
        for script in _SCRIPT.findall(page)
    )
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
