"""`GET /usage`: what the caller's key has used, or, for an admin's, what all have.

The numbers are those of the metrics: of the whole service, and as old as its last export. They
count from the start of the ingresses that run now; for bills ask Prometheus.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.api.keys import OTHER, ApiKeys, Key
from serve_app.api.request_record import trace_of
from serve_app.api.sse import dump
from serve_app.api.status_page import KeyUse, Service

# A sample of a metric by keys' names, in Prometheus' text.
_OF_A_KEY = re.compile(r'^ray_serve_app_key_\w+\{.*?\bkey="([^"\n]*)".*\n?', re.MULTILINE)


def shown_to(key: Key | None, metrics: str) -> str:
    """Return the page of metrics as a key may see it: other names' samples are an admin's.

    Args:
        key: of who asks; None where keys are not asked for.
        metrics: Prometheus' text.
    """
    if key is None or key.admin:
        return metrics
    own = None if key.label == OTHER else key.label
    return _OF_A_KEY.sub(lambda sample: sample[0] if sample[1] == own else "", metrics)


class UsagePage:
    """The usage of keys by name.

    Args:
        keys: the known keys.
        service: the service; None if nobody knows it.
    """

    def __init__(self, keys: ApiKeys, service: Service | None) -> None:
        self._keys = keys
        self._service = service

    def routes(self) -> list[Route]:
        """Return the one page; it exists where keys are asked for."""
        return [Route("/usage", self._show)]

    async def _show(self, request: Request) -> Response:
        load = await self._service.load() if self._service else None
        used = load.keys if load else None
        own = trace_of(request.scope).key
        assert own is not None  # noqa: S101 - without a key nobody comes here
        named = {key.name: key for key in self._keys.all} if own.admin else {own.name: own}
        shown = [_described(name, key, used) for name, key in named.items()]
        if own.admin and used:
            gone = used.keys() - {key.label for key in named.values()} | used.keys() & {OTHER}
            shown += [{"name": name, **_numbers(used[name])} for name in sorted(gone)]
        return Response(dump({"keys": shown}), media_type="application/json")


def _described(name: str, key: Key, used: Mapping[str, KeyUse] | None) -> dict[str, Any]:
    use = None if used is None or key.label == OTHER else used.get(name, KeyUse())
    return {
        "name": name,
        **_numbers(use),
        "limits": {"rpm": key.rpm, "tpm": key.tpm, "streams": key.streams},
        "priority": key.priority.name.lower(),
        "expires": key.expires and key.expires.isoformat(),
    }


def _numbers(use: KeyUse | None) -> dict[str, Any]:
    kinds = ("requests", "limited", "prompt_tokens", "completion_tokens")
    return {kind: use and getattr(use, kind) for kind in kinds}
