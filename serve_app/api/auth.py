"""API keys: a file of SHA-256 hashes, so that the file's reader cannot call the service.

One hash of 64 hex digits a line; anything behind it on the line is a note; `#` starts a
comment line. `printf %s "$KEY" | sha256sum` makes one. The file is read again when it has
changed; while it cannot be read, the keys read before go on counting.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import time
from pathlib import Path

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import ConfigError, InvalidApiKey

log = structlog.get_logger()

CHECK_INTERVAL_S = 1.0  # between two looks at the file's date and size
_HASH = re.compile(r"[0-9a-fA-F]{64}")


class ApiKeys:
    """The hashes of one file, as fresh as `CHECK_INTERVAL_S`.

    Raises:
        ConfigError: the file cannot be read, or a line is no hash; names the line only.
    """

    def __init__(self, path: str, *, check_interval_s: float = CHECK_INTERVAL_S) -> None:
        self._path = Path(path).expanduser()
        self._check_interval_s = check_interval_s
        self._stamp, self._hashes = self._read()
        self._checked = time.monotonic()

    async def allow(self, key: str) -> bool:
        """Tell whether the file holds this key's hash; takes as long for any key."""
        await self._refresh()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(digest, known)
        return found

    async def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < self._check_interval_s:
            return
        self._checked = now  # before the read: one request looks, the others go on
        try:
            if await asyncio.to_thread(self._look) != self._stamp:
                self._stamp, self._hashes = await asyncio.to_thread(self._read)
        except (ConfigError, OSError) as error:
            log.error("keys.failed", path=str(self._path), cause=type(error).__name__)

    def _look(self) -> tuple[int, int, int]:
        stat = self._path.stat()  # the inode too: a mounted secret changes by a link's swap
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _read(self) -> tuple[tuple[int, int, int], tuple[bytes, ...]]:
        try:
            stamp, text = self._look(), self._path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise ConfigError(
                f"api.api_keys_file {self._path} cannot be read: {reason}",
                param="api.api_keys_file",
            ) from None
        return stamp, tuple(self._hashes_of(text))

    def _hashes_of(self, text: str) -> list[bytes]:
        hashes = []
        for number, line in enumerate(text.splitlines(), start=1):
            first = (line.split() or ["#"])[0]
            if first.startswith("#"):
                continue
            if not _HASH.fullmatch(first):
                raise ConfigError(
                    f"api.api_keys_file {self._path}, line {number}: must be the SHA-256 of a key "
                    'in 64 hex digits; make one with: printf %s "$KEY" | sha256sum',
                    param="api.api_keys_file",
                )
            hashes.append(bytes.fromhex(first))
        return hashes


class RequireKey:
    """Lets a request through if it carries a known key; open paths and OPTIONS need none.

    Args:
        app: everything inside.
        keys: the known keys.
        open_paths: paths that probes ask without a key.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: frozenset[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on or refuse.

        Raises:
            InvalidApiKey: no key, or an unknown one.
        """
        if scope["type"] == "http" and not self._is_open(scope):
            scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not key.strip():
                raise InvalidApiKey("send an API key in the header `authorization: Bearer <key>`")
            if not await self._keys.allow(key.strip()):
                raise InvalidApiKey("this API key is not known here")
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        return scope["method"] == "OPTIONS" or path in self._open_paths
