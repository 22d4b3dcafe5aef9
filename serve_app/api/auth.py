"""Who may call, and how much: every request's key, and the limits of the key."""

from __future__ import annotations

from functools import partial

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.key_limits import KeyLimits
from serve_app.api.keys import ApiKeys, Key
from serve_app.api.request_record import trace_of
from serve_app.errors import ExpiredApiKey, InvalidApiKey


class RequireKey:
    """Lets a request through if it carries a known key; open paths and OPTIONS need none.

    Limits are of what is posted: requests to generate, and to encode.

    Args:
        app: everything inside.
        keys: the known keys.
        limits: what they have used.
        open_paths: paths that probes ask without a key.
    """

    def __init__(
        self, app: ASGIApp, keys: ApiKeys, limits: KeyLimits, open_paths: frozenset[str]
    ) -> None:
        self._app = app
        self._keys = keys
        self._limits = limits
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse.

        Raises:
            InvalidApiKey: no key, an unknown one, or one whose time is over.
            KeyLimitExceeded: the key's limit of requests is reached.
        """
        if scope["type"] != "http" or self._is_open(scope):
            await self._app(scope, receive, send)
            return
        trace = trace_of(scope)
        trace.key = key = self._known(Headers(scope=scope))
        trace.client = key.name
        if key.expires is not None and key.is_expired:
            raise ExpiredApiKey(f"this API key expired at {key.expires.isoformat()}")
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        trace.more_headers = partial(self._limits.headers, key)
        with self._limits.admitted(key) as allowance:
            trace.allowance = allowance
            try:
                await self._app(scope, receive, send)
            finally:
                allowance.settle(trace.usage.prompt_tokens + trace.usage.completion_tokens)

    def _known(self, headers: Headers) -> Key:
        scheme, _, text = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise InvalidApiKey("send an API key in the header `authorization: Bearer <key>`")
        key = self._keys.find(text.strip())
        if key is None:
            raise InvalidApiKey("this API key is not known here")
        return key

    def _is_open(self, scope: Scope) -> bool:
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        return scope["method"] == "OPTIONS" or path in self._open_paths
