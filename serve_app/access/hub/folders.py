"""A directory held open: what is done in it by name happens in it, and follows no link.

The cache is shared with other tools, other users and older runs, and the names in it come from
a Hub. Every step below the cache's root therefore goes through a descriptor of the directory
that was looked at (`openat` and its relatives), so a link that somebody put in the way is
refused instead of followed, and a file is replaced or removed only where it was meant to be.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Self, cast

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OWN = os.O_NOFOLLOW | os.O_CLOEXEC


class Linked(OSError):
    """A link, or something that is no plain file or folder, stands where we would write."""

    def __init__(self, path: Path) -> None:
        what = (
            f"{path} is a link or no plain file, and below the cache nothing is written through one"
        )
        super().__init__(errno.ELOOP, f"{what}; remove it, or name the right cache in HF_HUB_CACHE")


class Folder:
    """One directory below a root.

    Args:
        descriptor: of the directory; closed with this object.
        path: for messages and for readers.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self.path = path

    @classmethod
    def at(cls, root: Path, *names: str, create: bool = False) -> Folder:
        """Open a directory below a root that is trusted and may itself be behind links.

        Args:
            root: the cache.
            names: of the folders below it, each a single name.
            create: make what is missing.

        Raises:
            OSError: it is not there, may not be used, or a link stands in the way (`Linked`).
        """
        if create:
            root.mkdir(parents=True, exist_ok=True)
        folder = cls(os.open(root, _DIRECTORY), root)
        for name in names:
            with folder:
                folder = folder.enter(name, create=create)
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; safe to call twice."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def enter(self, name: str, *, create: bool = False) -> Folder:
        """Open a folder in this one; raises OSError, `Linked` for a link."""
        if create:
            with suppress(FileExistsError):
                os.mkdir(name, dir_fd=self._descriptor)
        try:
            opened = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise Linked(self.path / name) from None
            raise
        return Folder(opened, self.path / name)

    def stat(self, name: str) -> os.stat_result | None:
        """Return what lies here under a name, a link itself included; None for nothing."""
        try:
            return os.stat(name, dir_fd=self._descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def size(self, name: str) -> int | None:
        """Return the bytes of a plain file; None if there is none under the name."""
        found = self.stat(name)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    @contextmanager
    def appending(self, name: str) -> Iterator[BinaryIO]:
        """Open a plain file for writing at its end; made if it is not there.

        A link, or a second name of another file, is replaced by a file of its own.
        """
        found = self.stat(name)
        if found is not None and not (stat.S_ISREG(found.st_mode) and found.st_nlink == 1):
            self.unlink(name)
        with self._open(name, os.O_RDWR | os.O_CREAT, "r+b") as stream:
            stream.seek(0, os.SEEK_END)
            yield stream

    def reading(self, name: str) -> BinaryIO:
        """Open a plain file for reading; raises OSError, `Linked` for a link."""
        return self._open(name, os.O_RDONLY | os.O_NONBLOCK, "rb")

    def create(self, name: str) -> Path:
        """Make an empty file that was not there, for a program that needs a path.

        Returns:
            Its path.
        """
        self.unlink(name)
        self._open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, "r+b").close()
        return self.path / name

    def write(self, name: str, text: str) -> None:
        """Put a text under a name, at once or not at all; mode 0600."""
        temporary = _temporary()
        try:
            with self._open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, "r+b", 0o600) as stream:
                stream.write(text.encode())
            self.rename(temporary, name)
        except OSError:
            self.unlink(temporary)
            raise

    def link(self, name: str, target: str) -> None:
        """Put a symbolic link under a name, at once, in place of what was there."""
        temporary = _temporary()
        os.symlink(target, temporary, dir_fd=self._descriptor)
        try:
            self.rename(temporary, name)
        except OSError:
            self.unlink(temporary)
            raise

    def copy(self, source: Folder, name: str, new: str) -> None:
        """Put a copy of a file of another folder under a name, at once."""
        temporary = _temporary()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            with source.reading(name) as content, self._open(temporary, flags, "r+b") as copied:
                shutil.copyfileobj(content, copied)
            self.rename(temporary, new)
        except OSError:
            self.unlink(temporary)
            raise

    def rename(self, name: str, new: str, into: Folder | None = None) -> None:
        """Give a file another name, here or in another folder, in place of what was there."""
        target = into._descriptor if into else self._descriptor
        os.replace(name, new, src_dir_fd=self._descriptor, dst_dir_fd=target)

    def unlink(self, name: str) -> None:
        """Remove a file, or a link itself; nothing happens if there is none."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._descriptor)

    def names(self) -> list[str]:
        """Return the names of what is in the folder."""
        return os.listdir(self._descriptor)  # noqa: PTH208 (a path knows no descriptor)

    def open_lock(self, name: str) -> int:
        """Return a descriptor of a file that is there for its lock alone; `Linked` for a link."""
        try:
            return os.open(name, os.O_RDWR | os.O_CREAT | _OWN, 0o660, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Linked(self.path / name) from None
            raise

    def _open(self, name: str, flags: int, mode: str, bits: int = 0o644) -> BinaryIO:
        try:
            opened = os.open(name, flags | _OWN, bits, dir_fd=self._descriptor)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Linked(self.path / name) from None
            raise
        if not stat.S_ISREG(os.fstat(opened).st_mode):
            os.close(opened)
            raise Linked(self.path / name)
        return cast("BinaryIO", os.fdopen(opened, mode))


def _temporary() -> str:
    return f".tmp-{secrets.token_hex(8)}"
