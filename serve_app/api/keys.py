"""API keys: a file of SHA-256 hashes, so that the file's reader cannot call the service.

One key a line: 64 hex digits, which `printf %s "$KEY" | sha256sum` makes, and behind them what
the key may do, or a note:

    <hash> name=team-a rpm=60 tpm=10000 streams=8 priority=high expires=2027-01-01 admin # a note
    <hash> a note

`#` begins a comment. A line with a `=` has fields, of which `name` must be one; one without has
none, and its key has no limits. Lines of the same name share its limits, as while a key is
replaced. A date without a time ends the key as it begins, in UTC.

A thread of its own looks at the file every second, asked or not, and reads it when it has
changed and is the same at the next look, since a file that is being written may be empty: a
revoked key stops counting everywhere, and a file on a mount that hangs holds up that thread and no
request. While the file cannot be read, the keys read before go on counting.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import structlog

from serve_app.errors import ConfigError
from serve_app.protocol import Priority

log = structlog.get_logger()

CHECK_INTERVAL_S = 1.0  # between two looks at the file's date and size
STALE_S = 30.0  # without an answer of the file system, after which the log says so
MAX_FILE_BYTES = 4_194_304  # some 60,000 keys
MAX_LABELS = 100  # names that metrics know; the first of the file
OTHER = "other"  # the label of all further ones
_LEAST_INTERVAL_S = 0.01
_HASH = re.compile(r"[0-9a-fA-F]{64}")
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_COUNT = re.compile(r"[1-9][0-9]{0,11}")


@dataclass(frozen=True, slots=True)
class Key:
    """What the file says of a key; nothing of the key itself.

    Args:
        name: whose it is; several keys may have one. `key:` and 8 digits of the hash without one.
        rpm: requests a minute at the most.
        tpm: tokens a minute, of prompts and answers together.
        streams: requests at a time.
        priority: of its requests.
        expires: from when on it is refused, with a time zone.
        admin: it may see what all keys used.
        label: the name in metrics; few are different.
    """

    name: str
    rpm: int | None = None
    tpm: int | None = None
    streams: int | None = None
    priority: Priority = Priority.NORMAL
    expires: datetime | None = None
    admin: bool = False
    label: str = OTHER

    @property
    def limits(self) -> tuple[object, ...]:
        """What all keys of a name have in common."""
        return self.rpm, self.tpm, self.streams, self.priority

    @property
    def is_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.now(UTC) >= self.expires


class ApiKeys:
    """The keys of one file, as fresh as the interval.

    Args:
        path: of the file; `~` works.
        check_interval_s: between two looks at it.

    Raises:
        ConfigError: the file cannot be read, or a line is wrong; names the line only.
    """

    def __init__(self, path: str, *, check_interval_s: float = CHECK_INTERVAL_S) -> None:
        self._path = Path(path).expanduser()
        self._stamp, self._keys = self._read()
        self._seen = self._stamp  # at the last look
        self._looked = time.monotonic()
        self._said_stale = False
        threading.Thread(
            target=_watch,
            args=(weakref.ref(self), check_interval_s),
            name="serve-app-keys",
            daemon=True,  # it may hang in a file system for ever
        ).start()

    @property
    def all(self) -> tuple[Key, ...]:
        """The keys, in the order of the file."""
        return tuple(self._keys.values())

    def find(self, key: str) -> Key | None:
        """Return what the file says of a key; None if it does not hold its hash."""
        self._say_if_stale()
        # How long this takes says something of the hash alone, which nobody can choose.
        return self._keys.get(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest())

    def refresh(self) -> None:
        """Read the file again if it has changed, and not since the look before.

        Blocks as long as the file system does.
        """
        try:
            before, self._seen = self._seen, self._look()
            if self._stamp != self._seen == before:
                self._stamp, self._keys = self._read()
        except (ConfigError, OSError) as error:
            log.error("keys.failed", path=str(self._path), cause=_cause(error))
        self._looked = time.monotonic()
        self._said_stale = False

    def _say_if_stale(self) -> None:
        if not self._said_stale and time.monotonic() - self._looked > STALE_S:
            self._said_stale = True
            log.error("keys.failed", path=str(self._path), cause="NoAnswer")

    def _look(self) -> tuple[int, int, int]:
        # The inode too: a mounted secret changes by a link's swap.
        return _stamp(self._path.stat())

    def _read(self) -> tuple[tuple[int, int, int], dict[bytes, Key]]:
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
        return _stamp(facts), self._keys_of(text)

    def _unreadable(self, reason: str) -> ConfigError:
        return ConfigError(
            f"api.api_keys_file {self._path} cannot be read: {reason}", param="api.api_keys_file"
        )

    def _keys_of(self, text: str) -> dict[bytes, Key]:
        keys: dict[bytes, Key] = {}
        named: dict[str, Key] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            words = line.split("#")[0].split()
            if not words:
                continue
            try:
                digest, key = _read_line(words)
                label = key.name if len(named) < MAX_LABELS else OTHER
                first = named.setdefault(key.name, replace(key, label=label))
                if first.limits != key.limits:
                    raise ValueError("has other limits than the line before with its name")
                key = replace(key, label=first.label)
                if keys.setdefault(digest, key) != key:
                    raise ValueError("says something else of a key than a line before")
            except ValueError as error:
                raise ConfigError(
                    f"api.api_keys_file {self._path}, line {number}: {error}",
                    param="api.api_keys_file",
                ) from None
        return keys


def _read_line(words: list[str]) -> tuple[bytes, Key]:
    """Return a line's hash and what it says of the key.

    Raises:
        ValueError: what is wrong, as a sentence's end; nothing of the line but a known field.
    """
    first, *rest = words
    if not _HASH.fullmatch(first):
        raise ValueError(
            "must be the SHA-256 of a key in 64 hex digits; make one with: "
            'printf %s "$KEY" | sha256sum'
        )
    digest = bytes.fromhex(first)
    if not any("=" in word for word in rest):
        return digest, Key(f"key:{first[:8].lower()}")
    facts: dict[str, Any] = {}
    for word in rest:
        field, _, text = word.partition("=")
        if field not in _FIELDS or field in facts:
            known = ", ".join(_FIELDS)
            raise ValueError(f"has a field twice, or one that is not known; known are {known}")
        read, what = _FIELDS[field]
        try:
            facts[field] = read(text)
        except (ValueError, KeyError):
            raise ValueError(f"{field} must be {what}") from None
    if "name" not in facts:
        raise ValueError("has fields and no name; add name=NAME")
    return digest, Key(**facts)


def _name(text: str) -> str:
    if not _NAME.fullmatch(text) or text == OTHER:
        raise ValueError
    return text


def _count(text: str) -> int:
    if not _COUNT.fullmatch(text):
        raise ValueError
    return int(text)


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


def _flag(text: str) -> bool:
    if text:
        raise ValueError
    return True


_FIELDS: Mapping[str, tuple[Callable[[str], object], str]] = {
    "name": (_name, f"1 to 64 letters, digits or ._- and not {OTHER}"),
    "rpm": (_count, "a whole number of requests from 1"),
    "tpm": (_count, "a whole number of tokens from 1"),
    "streams": (_count, "a whole number of requests from 1"),
    "priority": (lambda text: Priority[text.upper()], "high, normal or low"),
    "expires": (_instant, "a date as 2027-01-31, or with a time as 2027-01-31T12:00Z"),
    "admin": (_flag, "a word without a value"),
}


def _cause(error: ConfigError | OSError) -> str:
    return error.message if isinstance(error, ConfigError) else type(error).__name__


def _watch(keys: weakref.ref[ApiKeys], interval_s: float) -> None:
    """Look at the file, which was read just now, until nobody has the keys any more."""
    while True:
        time.sleep(max(interval_s, _LEAST_INTERVAL_S))
        if (live := keys()) is None:
            return
        live.refresh()
        del live


def _stamp(facts: os.stat_result) -> tuple[int, int, int]:
    return facts.st_mtime_ns, facts.st_size, facts.st_ino
