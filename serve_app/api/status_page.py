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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.sse import dump

PAGE = Path(__file__).with_name("page.html")
_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class View:
    """What is known of a service.

    Args:
        replicas: what each is at, as plain data; None if nobody knows.
        license: title and sha256 of the text beside the weights, and their commit.
        max_context_tokens: the model's window; None if nobody knows.
    """

    replicas: list[dict[str, Any]] | None
    license: dict[str, Any] | None = None
    max_context_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class KeyUse:
    """What the keys of one name have used.

    Args:
        requests: that have ended, however.
        limited: of these, refused for a limit of the key.
        prompt_tokens: of answered requests.
        completion_tokens: likewise.
    """

    requests: int = 0
    limited: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """What a service does, by its metrics.

    Args:
        waiting: requests that have no place in a batch yet.
        running: requests in a batch.
        finished: requests that were answered.
        failed: requests to generate that failed or were refused.
        generation_tokens: of all requests that have ended.
        tokens_per_s: of those that ended lately; None before that was measured.
        keys: what API keys have used, by their names in metrics.
    """

    waiting: int
    running: int
    finished: int
    failed: int
    generation_tokens: int
    tokens_per_s: float | None = None
    keys: Mapping[str, KeyUse] = field(default_factory=dict)


class Service(Protocol):
    """All processes of the service; the application may run in one of several."""

    async def look(self) -> View: ...  # noqa: D102
    async def load(self) -> Load | None: ...  # noqa: D102


class StatusPage:
    """The page and its numbers.

    Args:
        about: what is served: model, commit, version.
        service: the service; None if nobody knows it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        about: dict[str, Any],
        service: Service | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._about = about
        self._service = service
        self._clock = clock
        self._started = clock()
        self._page = PAGE.read_bytes()

    def routes(self) -> list[Route]:
        """Return the page and its numbers."""
        return [Route("/", self._show), Route("/status", self._status)]

    def numbers(self, view: View, load: Load | None) -> dict[str, Any]:
        """Return what is served and what it does, as plain data; null where nobody knows."""
        text = view.license
        kinds = ("waiting", "running", "finished", "failed")
        return {
            **self._about,
            # Not the one of a version that is being replaced.
            "license": text if text and text["commit"] == self._about["commit"] else None,
            "uptime_s": round(self._clock() - self._started, 1),
            "requests": {kind: load and getattr(load, kind) for kind in kinds},
            "generation_tokens": load and load.generation_tokens,
            "tokens_per_s": load and load.tokens_per_s,
            "replicas": view.replicas,
        }

    async def _show(self, _request: Request) -> Response:
        return Response(
            self._page,
            media_type="text/html; charset=utf-8",
            headers={"content-security-policy": _policy(self._page), "cache-control": "no-cache"},
        )

    async def _status(self, _request: Request) -> Response:
        view, load = View(None), None
        if self._service:
            view, load = await asyncio.gather(self._service.look(), self._service.load())
        return Response(dump(self.numbers(view, load)), media_type="application/json")


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
