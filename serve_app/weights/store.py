"""One commit in the node's cache: what is whole, what is missing, and one process at a time.

The layout is huggingface_hub's, so that its other tools share every file: `blobs/<hash>`, and
`snapshots/<commit>/<path>` pointing there. A blob's name is its content's hash, which is
computed once for a file and remembered by size, time and inode. Only whole and verified files
get a name that others look for; what a dead process left behind is gone on with. What is
written, linked or removed lies in the folders of this repository and this commit, see
`access/hub/folders.py`; reading goes wherever the cache's links lead, since every byte is hashed.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import structlog

from serve_app.access.hub.folders import Folder
from serve_app.access.hub.listing import HubFile, cache, folder_name, repo_folder
from serve_app.access.hub.model_files import content_hasher
from serve_app.errors import ModelLoadError
from serve_app.weights.lock import exclusive
from serve_app.weights.partial import Partial, contiguous, journal_of, read_journal
from serve_app.weights.pieces import File

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
        self._name = folder_name(repo_id)
        self.blobs = repo_folder(repo_id) / "blobs"
        self.snapshot = repo_folder(repo_id) / "snapshots" / commit
        self._verified = cache() / OWN / "verified" / self._name
        self._suffix = "incomplete"
        self._hashed = 0  # bytes, so that verifying counts as progress
        self._counting = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let one process of this node fetch a repository at a time; the next finds it done.

        Raises:
            ModelLoadError: the cache cannot be used.
        """
        lock = self.repo_id.replace("/", "--") + ".lock"
        with ExitStack() as stack:
            try:
                self._open("blobs", create=True).close()
                self._open("snapshots", create=True).close()
                folder = stack.enter_context(Folder.at(cache(), OWN, create=True))
                Folder.at(cache(), OWN, "verified", self._name, create=True).close()
                is_alone = stack.enter_context(exclusive(folder, lock, self.progress))
            except OSError as error:
                message = f"the cache {cache()} cannot be used: {error.strerror}"
                raise ModelLoadError(message) from None
            self._suffix = "incomplete" if is_alone else f"{secrets.token_hex(4)}.incomplete"
            try:
                yield
            finally:
                if not is_alone:
                    self._remove_partials()

    def missing(self, files: Iterable[HubFile], *, remove: bool = True) -> list[HubFile]:
        """Return the files that are not here whole, each content once.

        Args:
            files: of the commit.
            remove: damaged ones, so that they can be fetched again.
        """
        lacking = (file for file in files if not self.has(file, remove=remove))
        return list({file.etag: file for file in lacking}.values())

    def absent(self, files: Iterable[HubFile]) -> list[HubFile]:
        """Return the files that are not here, each content once, by name alone."""
        return list({file.etag: file for file in files if self.place(file) is None}.values())

    def is_linked(self, files: Iterable[HubFile]) -> bool:
        """Return whether every file has its place in the commit's folder."""
        return all((self.snapshot / file.path).is_file() for file in files)

    def has(self, file: HubFile, *, remove: bool = True) -> bool:
        """Return whether a file is here with the right bytes; hashes it when first seen."""
        place = self.place(file)
        if place is None:
            return False
        if self._is_remembered(file, place):
            return True
        with place.open("rb") as stream:
            if place.stat().st_size == file.size and self._hash(stream, file) == file.etag:
                self._remember(file, place)
                return True
        log.warning("weights.damaged", repo_id=self.repo_id, file=file.path, path=str(place))
        if remove:
            self._remove(file)
        return False

    @contextmanager
    def appending(self, file: HubFile) -> Iterator[BinaryIO]:
        """Open what is here of a missing file from its first byte on, at its end."""
        name = self._partial(file)
        with self._open("blobs") as blobs, blobs.appending(name) as stream:
            if (spans := read_journal(blobs, name)) is not None:  # pieces came in any order
                stream.truncate(min(contiguous(spans), stream.tell()))
                blobs.unlink(journal_of(name))
                stream.seek(0, os.SEEK_END)
            yield stream

    def pieces(self, file: HubFile, cut: File) -> Partial:
        """Return the pieces of a missing file that are here."""
        return Partial(lambda: self._open("blobs"), self._partial(file), cut)

    def partial(self, file: HubFile) -> Path:
        """Return where the bytes of a file collect until it is whole."""
        return self.blobs / self._partial(file)

    def lacking_bytes(self, missing: Iterable[HubFile]) -> int:
        """Return what is still to come of missing files."""
        lacking = 0
        for file in missing:
            chunked = _size(self.blobs / self._chunked(file))
            lacking += file.size - max(self._begun_bytes(file), min(chunked, file.size))
        return lacking

    def prepare_chunked(self, file: HubFile) -> Path:
        """Make the empty file that the chunk store's client writes to."""
        with self._open("blobs") as blobs:
            return blobs.create(self._chunked(file))

    def accept_chunked(self, file: HubFile) -> None:
        """Give what came from the chunk store its name, if its bytes are right.

        Raises:
            Damaged: they are not.
        """
        self._accept(file, self._chunked(file))

    def accept(self, file: HubFile) -> None:
        """Give a file that has come its name, if its bytes are right.

        Raises:
            Damaged: they are not.
        """
        self._accept(file, self._partial(file))

    def adopt(self, file: HubFile, named: HubFile | None) -> None:
        """Give a file that has come the name that its content was found to have; raises OSError.

        Args:
            file: under the name by which it collected, where nobody knew its content's.
            named: the same under that; None: it is wrong, and removed.
        """
        with self._open("blobs") as blobs:
            if named is None:
                blobs.unlink(self._partial(file))
            else:
                blobs.rename(self._partial(file), named.etag)
                self._remember(named, self.blobs / named.etag)

    def link(self, files: Sequence[HubFile]) -> None:
        """Show the whole files under the commit's names, each at once or not at all."""
        uses = Counter(file.etag for file in files)
        with self._open("blobs") as blobs, self._open("snapshots", create=True) as snapshots:
            for file in files:
                uses[file.etag] -= 1
                pointer, blob = self.snapshot / file.path, self.blobs / file.etag
                if not blob.exists() or (pointer.exists() and pointer.samefile(blob)):
                    continue
                *folders, name = (self.commit, *file.path.split("/"))
                with _descend(snapshots, folders) as folder:
                    target = "/".join([*[".."] * (len(folders) + 1), "blobs", file.etag])
                    try:
                        folder.link(name, target)
                    except OSError:  # no links on this file system: the file itself
                        if uses[file.etag]:  # another name needs the same content
                            folder.copy(blobs, file.etag, name)
                        else:
                            blobs.rename(file.etag, name, folder)

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

    @property
    def own_suffix(self) -> str:
        """What tells this process's partial files from others'; "" where there can be no others."""
        return self._suffix.removesuffix("incomplete").rstrip(".")

    def progress(self) -> int:
        """Return a number of bytes that grows as long as files arrive or are verified."""
        total = self._hashed
        for path in self.blobs.iterdir():
            with suppress(OSError):  # renamed or removed meanwhile
                total += path.stat().st_size
        return total

    def place(self, file: HubFile) -> Path | None:
        """Return where a file is, whole or damaged; None if it is not here."""
        places = (self.blobs / file.etag, self.snapshot / file.path)
        return next((place for place in places if place.is_file()), None)

    def _open(self, name: str, *, create: bool = False) -> Folder:
        return Folder.at(cache(), self._name, name, create=create)

    def _partial(self, file: HubFile) -> str:
        return f"{file.etag}.{self._suffix}"

    def _chunked(self, file: HubFile) -> str:
        return f"{file.etag}.xet.{self._suffix}"

    def _begun_bytes(self, file: HubFile) -> int:
        have = _size(self.partial(file))
        with suppress(OSError), self._open("blobs") as blobs:
            if have and (spans := read_journal(blobs, self._partial(file))) is not None:
                return min(file.size, sum(stop - start for start, stop in spans))
        return have if have <= file.size else 0

    def _accept(self, file: HubFile, name: str) -> None:
        with self._open("blobs") as blobs:
            is_right = blobs.size(name) == file.size
            if is_right:
                with blobs.reading(name) as stream:
                    is_right = self._hash(stream, file) == file.etag
            if not is_right:
                blobs.unlink(name)
                raise Damaged(file.path)
            blobs.rename(name, file.etag)
        self._remember(file, self.blobs / file.etag)

    def _remove(self, file: HubFile) -> None:
        """Remove a damaged file from where it is; of a link the link alone."""
        with self._open("blobs") as blobs:
            if blobs.stat(file.etag) is not None:
                blobs.unlink(file.etag)
                return
        *folders, name = (self.commit, *file.path.split("/"))
        with self._open("snapshots") as snapshots, _descend(snapshots, folders) as folder:
            folder.unlink(name)

    def _remove_partials(self) -> None:
        with suppress(OSError), self._open("blobs") as blobs:
            for name in blobs.names():
                if name.endswith(f".{self._suffix}"):
                    blobs.unlink(name)

    def _is_remembered(self, file: HubFile, place: Path) -> bool:
        try:
            return (self._verified / file.etag).read_text(encoding="ascii") == _identity(place)
        except (OSError, ValueError):
            return False

    def _remember(self, file: HubFile, place: Path) -> None:
        place_of_notes = (OWN, "verified", self._name)
        # A full or read-only disk only costs hashing it once more.
        with suppress(OSError), Folder.at(cache(), *place_of_notes, create=True) as verified:
            verified.write(file.etag, _identity(place))

    def _hash(self, stream: BinaryIO, file: HubFile) -> str:
        """Compute a file's name: SHA-256 of large files, Git's object id of the others."""
        digest = content_hasher(file.size, is_large=len(file.etag) == 64)
        while piece := stream.read(HASH_BYTES):
            digest.update(piece)
            with self._counting:
                self._hashed += len(piece)
        return str(digest.hexdigest())


@contextmanager
def _descend(folder: Folder, names: Sequence[str]) -> Iterator[Folder]:
    """Open folders one below the other, making what is missing."""
    opened: list[Folder] = []
    try:
        for name in names:
            folder = folder.enter(name, create=True)
            opened.append(folder)
        yield folder
    finally:
        for each in opened:
            each.close()


def _size(path: Path) -> int:
    try:
        found = path.lstat()
    except OSError:
        return 0
    return found.st_size if stat.S_ISREG(found.st_mode) else 0


def _identity(path: Path) -> str:
    """Return what changes whenever a file is written or replaced."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ino}"
