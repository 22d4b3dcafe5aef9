"""Files on this node by which access is decided: looked at every second, read by others.

A thread of its own looks at date, size and inode, so that a mount that hangs holds up nothing
else. What changed is left in the cluster's memory for who checks grants: of N nodes only those
are asked again whose files changed.

    changed/<application>/<node id>/<kind>/<stamp>    to create it is to have seen it first
"""

from __future__ import annotations

import pwd
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import structlog
from huggingface_hub import constants
from ray.exceptions import RayError

from serve_app.access_config import AccessConfig
from serve_app.cluster import kv
from serve_app.redaction import place_of

log = structlog.get_logger()

PREFIX = "changed/"
LOOK_S = 1.0
PAUSE_S = 5.0  # after a change that could not be reported
TOKEN, IDENTITY, KEYS = "token", "identity", "keys"
GONE = "gone"
GRANTING = frozenset({TOKEN, IDENTITY})  # of which a change may end a grant

Stamp = tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class Change:
    """A file that is another one than a moment ago.

    Args:
        kind: `token`, `identity` or `keys`.
        path: of the file.
        stamp: names what is there now, without its content; `gone` for nothing.
        owner: the user that the file belongs to; `nobody` if it is gone.
    """

    kind: str
    path: str
    stamp: str
    owner: str


def token_files(access: AccessConfig) -> dict[str, Path]:
    """Return the files that this process's token comes from, or would come from, by kind."""
    if access.identity is not None:
        return {IDENTITY: Path(access.identity.token_file).expanduser()}
    if access.token_file is not None:
        return {TOKEN: Path(access.token_file).expanduser()}
    return {TOKEN: Path(constants.HF_TOKEN_PATH)}


@dataclass(frozen=True, slots=True)
class Look:
    """What a node's files are now.

    Args:
        stamps: by kind.
        changes: the files that are others than were known.
    """

    stamps: dict[str, str]
    changes: tuple[Change, ...] = ()


def look_until_change(access: AccessConfig, known: dict[str, str] | None, limit_s: float) -> Look:
    """Look at this process's token files until one is another one than is known.

    For nodes where no process of ours runs all the time.

    Args:
        access: names the files.
        known: what they were at the last look; None returns what they are now.
        limit_s: after which nothing has changed.
    """
    files = token_files(access)
    ends_at = time.monotonic() + limit_s
    while True:
        now = {kind: _change(kind, path, _stamp(path)) for kind, path in files.items()}
        stamps = {kind: change.stamp for kind, change in now.items()}
        changes = () if known is None else _differing(known, now)
        if known is None or changes or time.monotonic() >= ends_at:
            return Look(stamps, changes)
        time.sleep(LOOK_S)


def _differing(known: Mapping[str, str], now: Mapping[str, Change]) -> tuple[Change, ...]:
    return tuple(change for kind, change in now.items() if known.get(kind) != change.stamp)


class FileWatch:
    """Looks at files until it is stopped.

    Args:
        files: by kind; what they are now counts as known.
        on_change: called in the thread for each file that changed; should it raise, which is
            logged, again for the same change.
        look_s: seconds between two looks.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        on_change: Callable[[Change], None],
        *,
        look_s: float = LOOK_S,
    ) -> None:
        self._files = dict(files)
        self._on_change = on_change
        self._look_s = look_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="serve-app-files", daemon=True)

    def start(self) -> None:
        """Look from now on; the thread may hang in a file system for ever."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more; does not wait."""
        self._over.set()

    def _run(self) -> None:
        known = {kind: _stamp(path) for kind, path in self._files.items()}
        while not self._over.wait(self._look_s):
            for kind, path in self._files.items():
                now = _stamp(path)
                if now != known[kind] and self._report(_change(kind, path, now)):
                    known[kind] = now

    def _report(self, change: Change) -> bool:
        try:
            self._on_change(change)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next change has to be seen)
            log.error("job.failed", job="files", cause=type(error).__name__, where=place_of(error))
            self._over.wait(PAUSE_S)
            return False
        return True


def announce(application: str, node_id: str, change: Change) -> bool:
    """Leave a change for who checks grants.

    Args:
        application: its name in Serve.
        node_id: Ray's id of this node.
        change: what was seen.

    Returns:
        Whether it is new: of several processes on a node one was the first. False also where the
        cluster does not answer; the next round checks every node anyhow.
    """
    place = f"{_place(application)}{node_id}/{change.kind}/"
    key = f"{place}{change.stamp}"
    with suppress(RayError):
        if not kv.put(key, change.path, overwrite=False):
            return False
        for old in kv.keys(place):
            if old != key:
                kv.delete(old)
        return True
    return False


class Announced:
    """The changes that nodes have announced since this object was made.

    Args:
        application: its name in Serve.
    """

    def __init__(self, application: str) -> None:
        self._place = _place(application)
        self._seen: set[str] = set()
        with suppress(RayError):
            self._seen = set(kv.keys(self._place))

    def nodes(self) -> frozenset[str]:
        """Return the ids of the nodes whose token or identity changed since the last call."""
        try:
            now = set(kv.keys(self._place))
        except RayError:
            return frozenset()  # the next call returns them
        new, self._seen = now - self._seen, now
        parts = (key.removeprefix(self._place).split("/") for key in new)
        return frozenset(unquote(node) for node, kind, _ in parts if kind in GRANTING)


def _place(application: str) -> str:
    return f"{PREFIX}{quote(application, safe='')}/"


def _stamp(path: Path) -> Stamp:
    try:
        facts = path.stat()
    except OSError:
        return None
    # The inode too: a mounted secret changes by a link's swap.
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


def _change(kind: str, path: Path, stamp: Stamp) -> Change:
    named = GONE if stamp is None else "-".join(map(str, stamp))
    return Change(kind, str(path), named, _owner(path))


def _owner(path: Path) -> str:
    try:
        user = path.stat().st_uid
    except OSError:
        return "nobody"
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"uid {user}"
