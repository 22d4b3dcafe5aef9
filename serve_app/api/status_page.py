"""The status page at `/` and the numbers behind it at `/status`.

The page is one file without outside resources; it holds no data itself. It asks `/status`,
`/access` and the API as any client does, with the visitor's API key where keys are set.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.sse import dump
from serve_app.errors import ServeAppError
from serve_app.protocol import GenerationRequest, LLMEngine, Prompt, PromptTokens, TokenDelta

PAGE = Path(__file__).with_name("page.html")
RATE_WINDOW_S = 10
TELL_S = 1.0
_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


class Counts(TypedDict):
    """What passed through one board; plain, so that it travels as JSON.

    `waiting` requests have no token yet, `running` ones have; `recent` holds pairs of a Unix
    second and the tokens that came in it.
    """

    waiting: int
    running: int
    finished: int
    failed: int
    generation_tokens: int
    recent: list[list[int]]


@dataclass(frozen=True, slots=True)
class View:
    """The rest of a service that several boards share.

    Args:
        replicas: what each is at, as plain data; None if nobody knows.
        others: the other boards' counts.
        license: title and sha256 of the text beside the weights, and their commit.
        max_context_tokens: the model's window; None if nobody knows.
    """

    replicas: list[dict[str, Any]] | None
    others: tuple[Counts, ...]
    license: dict[str, Any] | None = None
    max_context_tokens: int | None = None


class Whole(Protocol):
    """Where boards meet."""

    def tell(self, counts: Counts) -> None: ...  # noqa: D102
    async def look(self) -> View: ...  # noqa: D102


class Board:
    """An `LLMEngine` that counts what passes through it.

    Args:
        engine: answers.
        about: what is served: model, commit, version.
        whole: the other boards of the service; None if there are none.
        clock: Unix seconds, which all boards share.
    """

    def __init__(
        self,
        engine: LLMEngine,
        about: dict[str, Any],
        whole: Whole | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._engine = engine
        self._about = about
        self._whole = whole
        self._clock = clock
        self._started = clock()
        self._counts = Counts(
            waiting=0, running=0, finished=0, failed=0, generation_tokens=0, recent=[]
        )
        self._telling: asyncio.TimerHandle | None = None
        self._publishing: asyncio.Future[None] | None = None
        self._page = PAGE.read_bytes()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenDelta]:
        """Pass deltas on and count them; see `LLMEngine.generate`."""
        counts = self._counts
        counts["waiting"] += 1
        self._changed()
        begun = False
        deltas: Any = self._engine.generate(request)
        open_completions = request.n
        try:
            async with aclosing(deltas):
                async for delta in deltas:
                    if not begun:
                        begun = True
                        counts["waiting"] -= 1
                        counts["running"] += 1
                    self._count(len(delta.token_ids))
                    if delta.finish_reason is not None:
                        open_completions -= 1
                        # Before the last delta is handed over: its reader may not come back.
                        counts["finished"] += open_completions == 0
                    yield delta
        except ServeAppError:
            counts["failed"] += 1
            raise
        finally:
            counts["running" if begun else "waiting"] -= 1
            self._changed()

    async def ready(self) -> bool:
        """See `LLMEngine.ready`."""
        return await self._engine.ready()

    async def tokenize(self, prompt: Prompt) -> PromptTokens:
        """See `LLMEngine.tokenize`."""
        return await self._engine.tokenize(prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """See `LLMEngine.detokenize`."""
        return await self._engine.detokenize(token_ids)

    async def token_strings(self, token_ids: tuple[int, ...]) -> tuple[str, ...]:
        """See `LLMEngine.token_strings`."""
        return await self._engine.token_strings(token_ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        """See `LLMEngine.tokenizer_info`."""
        return await self._engine.tokenizer_info()

    def routes(self) -> list[Route]:
        """Return the page and its numbers."""
        return [Route("/", self._show), Route("/status", self._status)]

    def numbers(self, view: View) -> dict[str, Any]:
        """Return what is served and how much by all boards, as plain data.

        Tokens per second are those of the last ten. A request waits until its first token.
        """
        now = self._clock()
        boards = [self._counts, *view.others]
        recent = sum(
            tokens
            for board in boards
            for second, tokens in board["recent"]
            if second >= now - RATE_WINDOW_S
        )
        text = view.license
        return {
            **self._about,
            # Not the one of a version that is being replaced.
            "license": text if text and text["commit"] == self._about["commit"] else None,
            "uptime_s": round(now - self._started, 1),
            "requests": {
                "waiting": sum(board["waiting"] for board in boards),
                "running": sum(board["running"] for board in boards),
                "finished": sum(board["finished"] for board in boards),
                "failed": sum(board["failed"] for board in boards),
            },
            "generation_tokens": sum(board["generation_tokens"] for board in boards),
            "tokens_per_s": round(recent / min(RATE_WINDOW_S, max(1.0, now - self._started)), 1),
            "replicas": view.replicas,
        }

    def _count(self, tokens: int) -> None:
        self._counts["generation_tokens"] += tokens
        second, recent = int(self._clock()), self._counts["recent"]
        if recent and recent[-1][0] == second:
            recent[-1][1] += tokens
            return
        recent.append([second, tokens])
        del recent[: -RATE_WINDOW_S - 1]
        self._changed()

    def _changed(self) -> None:
        """Tell the other boards, a second later and all that came meanwhile at once."""
        if self._whole and self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(TELL_S, self._tell, self._whole)

    def _tell(self, whole: Whole) -> None:
        self._telling = None
        if self._publishing is not None and not self._publishing.done():
            self._changed()  # where the counts go does not answer: one thread at most waits there
            return
        counts = self._counts.copy()
        counts["recent"] = [list(pair) for pair in counts["recent"]]
        loop = asyncio.get_running_loop()
        self._publishing = loop.run_in_executor(None, whole.tell, counts)

    async def _show(self, _request: Request) -> Response:
        return Response(
            self._page,
            media_type="text/html; charset=utf-8",
            headers={"content-security-policy": _policy(self._page), "cache-control": "no-cache"},
        )

    async def _status(self, _request: Request) -> Response:
        view = await self._whole.look() if self._whole else View(None, ())
        return Response(dump(self.numbers(view)), media_type="application/json")


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
