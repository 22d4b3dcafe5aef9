"""API keys: a file of SHA-256 hashes, so that the file's reader cannot call the service.

One hash of 64 hex digits a line; anything behind it on the line is a note; `#` starts a
comment line. `printf %s "$KEY" | sha256sum` makes one. A thread of its own looks at the file
every second, asked or not, and reads it when it has changed: a revoked key stops counting
everywhere, and a file on a mount that hangs holds up that thread and no request. While the file
cannot be read, the keys read before go on counting.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
import threading
import time
import weakref
from pathlib import Path

import structlog
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.api.request_record import trace_of
from serve_app.errors import ConfigError, InvalidApiKey

log = structlog.get_logger()

CHECK_INTERVAL_S = 1.0  # between two looks at the file's date and size
STALE_S = 30.0  # without an answer of the file system, after which the log says so
MAX_FILE_BYTES = 4_194_304  # some 60,000 keys
_LEAST_INTERVAL_S = 0.01
_HASH = re.compile(r"[0-9a-fA-F]{64}")


class ApiKeys:
    """The hashes of one file, as fresh as the interval.

    Args:
        path: of the file; `~` works.
        check_interval_s: between two looks at it.

    Raises:
        ConfigError: the file cannot be read, or a line is no hash; names the line only.
    """

    def __init__(self, path: str, *, check_interval_s: float = CHECK_INTERVAL_S) -> None:
        self._path = Path(path).expanduser()
        self._stamp, self._hashes = self._read()
        self._looked = time.monotonic()
        self._said_stale = False
        threading.Thread(
            target=_watch,
            args=(weakref.ref(self), check_interval_s),
            name="serve-app-keys",
            daemon=True,  # it may hang in a file system for ever
        ).start()

    async def allow(self, key: str) -> bool:
        """Return whether the file holds this key's hash; takes as long for any key."""
        self._say_if_stale()
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(digest, known)
        return found

    def refresh(self) -> None:
        """Read the file again if it has changed; blocks as long as the file system does."""
        try:
            if self._look() != self._stamp:
                self._stamp, self._hashes = self._read()
        except (ConfigError, OSError) as error:
            log.error("keys.failed", path=str(self._path), cause=type(error).__name__)
        self._looked = time.monotonic()
        self._said_stale = False

    def _say_if_stale(self) -> None:
        if not self._said_stale and time.monotonic() - self._looked > STALE_S:
            self._said_stale = True
            log.error("keys.failed", path=str(self._path), cause="NoAnswer")

    def _look(self) -> tuple[int, int, int]:
        # The inode too: a mounted secret changes by a link's swap.
        return _stamp(self._path.stat())

    def _read(self) -> tuple[tuple[int, int, int], tuple[bytes, ...]]:
        try:
            # Opening a FIFO would wait for a writer.
            with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                facts = os.fstat(file.fileno())
                if not stat.S_ISREG(facts.st_mode):
                    raise self._unreadable("it is not a file")
                content = file.read(MAX_FILE_BYTES + 1)
            if len(content) > MAX_FILE_BYTES:
                raise self._unreadable(f"it is over {MAX_FILE_BYTES} bytes")
            text = content.decode("utf-8")
        except OSError as error:
            raise self._unreadable(error.strerror or type(error).__name__) from None
        except UnicodeDecodeError:
            raise self._unreadable("it is not text") from None
        return _stamp(facts), tuple(self._hashes_of(text))

    def _unreadable(self, reason: str) -> ConfigError:
        return ConfigError(
            f"api.api_keys_file {self._path} cannot be read: {reason}", param="api.api_keys_file"
        )

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


def _watch(keys: weakref.ref[ApiKeys], interval_s: float) -> None:
    """Look at the file until nobody has the keys any more."""
    while (live := keys()) is not None:
        live.refresh()
        del live
        time.sleep(max(interval_s, _LEAST_INTERVAL_S))


def _stamp(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


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
            trace_of(scope).client = f"key:{hashlib.sha256(key.strip().encode()).hexdigest()[:8]}"
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        return scope["method"] == "OPTIONS" or path in self._open_paths
