"""One commit in the node's cache: what is whole, what is missing, and one process at a time.

The layout is huggingface_hub's, so that its other tools share every file: `blobs/<hash>`, and
`snapshots/<commit>/<path>` pointing there. A blob's name is its content's hash, which is
computed once for a file and remembered by size, time and inode. Only whole and verified files
get a name that others look for; what a dead process left behind is gone on with.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from serve_app.access.download import HubFile, cache, repo_folder
from serve_app.errors import ModelLoadError

log = structlog.get_logger()

OWN = ".serve-app"  # our folder in the cache: locks, receipts, what was verified
HASH_BYTES = 4 << 20


class Damaged(Exception):
    """The bytes that came are not those the Hub describes; they are gone."""


class Store:
    """One commit of one repository in this node's cache.

    Args:
        repo_id: the repository.
        commit: 40 hex digits.
    """

    def __init__(self, repo_id: str, commit: str) -> None:
        self.repo_id = repo_id
        self.commit = commit
        self.blobs = repo_folder(repo_id) / "blobs"
        self.snapshot = repo_folder(repo_id) / "snapshots" / commit
        self._own = cache() / OWN
        self._verified = self._own / "verified" / repo_folder(repo_id).name
        self._hashed = 0  # bytes, so that verifying counts as progress
        self._counting = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process of this node bring a repository at a time; the next finds it done.

        The kernel frees the lock of a process that dies.

        Raises:
            ModelLoadError: the cache cannot be used.
        """
        lock = self._own / (self.repo_id.replace("/", "--") + ".lock")
        try:
            for folder in (lock.parent, self.blobs, self.snapshot.parent, self._verified):
                folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        except OSError as error:
            raise ModelLoadError(f"the cache {cache()} cannot be used: {error.strerror}") from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def missing(self, files: Iterable[HubFile]) -> list[HubFile]:
        """Return the files that are not here whole, each content once; damaged ones are removed."""
        return list({file.etag: file for file in files if not self.has(file)}.values())

    def absent(self, files: Iterable[HubFile]) -> list[HubFile]:
        """Return the files that are not here, each content once, by name alone."""
        return list({file.etag: file for file in files if self._place(file) is None}.values())

    def has(self, file: HubFile) -> bool:
        """Tell whether a file is here with the right bytes; hashes what it sees the first time."""
        place = self._place(file)
        if place is None:
            return False
        if self._is_remembered(file, place):
            return True
        if place.stat().st_size == file.size and self._hash(place, file) == file.etag:
            self._remember(file, place)
            return True
        log.warning("weights.damaged", repo_id=self.repo_id, file=file.path, path=str(place))
        place.unlink()
        return False

    def partial(self, file: HubFile) -> Path:
        """Return where the bytes of a file collect until it is whole."""
        return self.blobs / f"{file.etag}.incomplete"

    def begun_bytes(self, file: HubFile) -> int:
        """Return how much of a missing file is here already."""
        partial = self.partial(file)
        have = partial.stat().st_size if partial.exists() else 0
        return have if have <= file.size else 0

    def lacking_bytes(self, missing: Iterable[HubFile]) -> int:
        """Return what is still to come of missing files."""
        return sum(file.size - self.begun_bytes(file) for file in missing)

    def accept(self, file: HubFile) -> None:
        """Give a file that has come its name, if its bytes are right.

        Raises:
            Damaged: they are not.
        """
        partial, blob = self.partial(file), self.blobs / file.etag
        if partial.stat().st_size != file.size or self._hash(partial, file) != file.etag:
            partial.unlink()
            raise Damaged(file.path)
        partial.replace(blob)
        self._remember(file, blob)

    def link(self, files: Iterable[HubFile]) -> None:
        """Show the whole files under the commit's names, each at once or not at all."""
        for file in files:
            pointer, blob = self.snapshot / file.path, self.blobs / file.etag
            if not blob.exists() or (pointer.exists() and pointer.samefile(blob)):
                continue
            pointer.parent.mkdir(parents=True, exist_ok=True)
            temporary = pointer.with_name(f".{pointer.name}.{os.getpid()}")
            temporary.unlink(missing_ok=True)
            try:
                temporary.symlink_to(os.path.relpath(blob, pointer.parent))
            except OSError:  # no links on this file system: the file itself, as huggingface_hub
                blob.replace(pointer)
            else:
                temporary.replace(pointer)

    def require_room(self, files: Sequence[HubFile], missing: Sequence[HubFile]) -> None:
        """Refuse a download that cannot fit, before its first byte.

        Raises:
            ModelLoadError: names the bytes needed, the bytes free, the place, and what to remove.
        """
        needed = self.lacking_bytes(missing)
        free = shutil.disk_usage(self.blobs).free
        if needed <= free:
            return
        message = (
            f"{self.repo_id} at {self.commit} needs {needed:,} more bytes in {cache()}, where "
            f"{free:,} are free"
        )
        if old := self.old_revisions(files):
            listed = " ".join(old)
            message += f"; `hf cache rm {listed}` frees {sum(old.values()):,}, if nobody uses them"
        raise ModelLoadError(message, needed_bytes=needed, free_bytes=free)

    def old_revisions(self, files: Iterable[HubFile]) -> dict[str, int]:
        """Return the other commits in the cache, each with the bytes that it alone holds."""
        held = {
            folder.name: {path.resolve() for path in folder.rglob("*") if path.is_file()}
            for folder in self.snapshot.parent.iterdir()
            if folder.is_dir()
        }
        held[self.commit] = {(self.blobs / file.etag).resolve() for file in files}
        old = {}
        for commit in sorted(held.keys() - {self.commit}):
            others = set().union(*(files for name, files in held.items() if name != commit))
            old[commit] = sum(path.stat().st_size for path in held[commit] - others)
        return old

    def progress(self) -> int:
        """Return a number of bytes that grows as long as files arrive or are verified."""
        total = self._hashed
        for path in self.blobs.iterdir():
            with suppress(OSError):  # renamed or removed meanwhile
                total += path.stat().st_size
        return total

    def _place(self, file: HubFile) -> Path | None:
        places = (self.blobs / file.etag, self.snapshot / file.path)
        return next((place for place in places if place.is_file()), None)

    def _is_remembered(self, file: HubFile, place: Path) -> bool:
        try:
            return (self._verified / file.etag).read_text(encoding="ascii") == _identity(place)
        except (OSError, ValueError):
            return False

    def _remember(self, file: HubFile, place: Path) -> None:
        temporary = self._verified / f".{file.etag}.{os.getpid()}"
        with suppress(OSError):  # a full disk only costs hashing it once more
            temporary.write_text(_identity(place), encoding="ascii")
            temporary.replace(self._verified / file.etag)

    def _hash(self, path: Path, file: HubFile) -> str:
        """Compute a file's name: SHA-256 of large files, Git's object id of the others."""
        if len(file.etag) == 64:
            digest = hashlib.sha256()
        else:
            digest = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)
        with path.open("rb") as stream:
            while piece := stream.read(HASH_BYTES):
                digest.update(piece)
                with self._counting:
                    self._hashed += len(piece)
        return digest.hexdigest()


def _identity(path: Path) -> str:
    """Return what changes whenever a file is written or replaced."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
