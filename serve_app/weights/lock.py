"""One process of a node at a time, on whatever file system the cache lies.

The kernel's lock where there is one: it ends with its process. Without it (NFS mounted `nolock`,
Lustre, object stores) a marker file, which a dead process leaves behind; whoever waits for one
that makes no progress goes on without. That costs a download, never a wrong byte: without the
kernel's lock every process collects bytes in files of its own, and all are hashed.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog
from filelock import SoftFileLock, Timeout

from serve_app.access.hub.folders import Folder

log = structlog.get_logger()

POLL_S = 0.5
STALL_S = 120.0  # without a sign of progress, after which the marker's owner counts as dead


@contextmanager
def exclusive(folder: Folder, name: str, progress: Callable[[], int]) -> Iterator[bool]:
    """Hold a lock for as long as the block runs; waits for who has it.

    Args:
        folder: where the lock's file is.
        name: of the file.
        progress: a number that grows as long as whoever has the lock gets on.

    Yields:
        True if nobody else can be in the block; False if that is not certain.

    Raises:
        OSError: the file cannot be made.
    """
    descriptor = folder.open_lock(name)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("weights.lock_unavailable", path=str(folder.path), reason=error.strerror)
        else:
            yield True
            return
        with _marked(folder.path / f"{name}.soft", progress):
            yield False
    finally:
        os.close(descriptor)


@contextmanager
def _marked(path: Path, progress: Callable[[], int]) -> Iterator[None]:
    lock = SoftFileLock(path)
    seen, since = -1, time.monotonic()
    while not lock.is_locked:
        try:
            lock.acquire(timeout=POLL_S)
        except Timeout:
            if (now := progress()) != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STALL_S:
                break
        except (OSError, NotImplementedError):
            break  # not even that: everybody for himself
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()
