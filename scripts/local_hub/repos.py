"""Repositories: commits, refs, files and the hashes that the Hub states.

Content is bytes or a file on disk, read in chunks. Hashes are computed once, on first use; a
commit that is not given is derived from them, so naming commits makes a large repository free
until somebody asks.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

CHUNK_BYTES = 1 << 20
# The Hub's default .gitattributes sends these, and any file over 10 MiB, to large-file storage.
LARGE_SUFFIXES = frozenset({".safetensors", ".bin", ".gguf", ".pt", ".pth", ".h5", ".onnx"})
LARGE_BYTES = 10 << 20
# Readable by anybody at the root of a gated repository.
OPEN_FILES = frozenset({"README.md", "LICENSE", "LICENSE.md", "LICENSE.txt"})

Gated = Literal["auto", "manual", False]


class RepoFile:
    """One file of one commit.

    Args:
        path: its place in the repository, with `/`.
        source: the bytes, or the file on disk that holds them.
    """

    def __init__(self, path: str, source: bytes | Path) -> None:
        self.path = path
        self._source = source
        self.size = len(source) if isinstance(source, bytes) else source.stat().st_size
        self.is_large = PurePosixPath(path).suffix in LARGE_SUFFIXES or self.size > LARGE_BYTES

    def open(self) -> BinaryIO:
        """Open the content for reading."""
        if isinstance(self._source, bytes):
            return io.BytesIO(self._source)
        return self._source.open("rb")

    def chunks(self) -> Iterator[bytes]:
        """Read the content piece by piece."""
        with self.open() as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    @cached_property
    def sha256(self) -> str:
        """The content's SHA-256 in hex."""
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    @property
    def _pointer(self) -> bytes:
        oid = f"oid sha256:{self.sha256}\nsize {self.size}\n"
        return f"version https://git-lfs.github.com/spec/v1\n{oid}".encode()

    @property
    def pointer_size(self) -> int:
        """Bytes of the Git LFS pointer that stands for a large file."""
        return len(self._pointer)

    @cached_property
    def blob_id(self) -> str:
        """The Git object id, of the content or of the pointer of a large file."""
        size, pieces = self.size, self.chunks()
        if self.is_large:
            size, pieces = self.pointer_size, iter([self._pointer])
        digest = hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
        for piece in pieces:
            digest.update(piece)
        return digest.hexdigest()

    @property
    def etag(self) -> str:
        """The entity tag without quotes: SHA-256 of a large file, else the Git object id."""
        return self.sha256 if self.is_large else self.blob_id

    @property
    def xet_hash(self) -> str:
        """A well-formed Xet hash (64 hex digits), distinct from the SHA-256."""
        return hashlib.sha256(f"xet:{self.sha256}".encode()).hexdigest()


class Repo:
    """A model repository with one or more commits.

    Args:
        repo_id: `owner/name`, or `name`.
        files: content by path; a `Path` is read from disk when it is asked for.
        gated: False is public.
        revisions: commit (40 hex digits) by branch or tag name, all with these files;
            default: `main`, with a commit derived from the content.
        readers: accounts that may see a private repository; None is public.
        xet: large files have Xet hashes and the read-token route answers.
    """

    def __init__(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        gated: Gated = "auto",
        revisions: Mapping[str, str] | None = None,
        readers: frozenset[str] | None = None,
        xet: bool = False,
    ) -> None:
        self.repo_id = repo_id
        self.gated: Gated = gated
        self.readers = readers
        self.xet = xet
        self.refs: dict[str, str] = {}
        self._commits: dict[str, dict[str, RepoFile]] = {}
        if revisions is None:
            self.push(files)
        for revision, commit in (revisions or {}).items():
            self.push(files, revision=revision, commit=commit)

    @classmethod
    def from_dir(cls, repo_id: str, root: Path, *, gated: Gated = "auto") -> Repo:
        """Hold the files under a directory, hidden ones excepted."""
        files = {
            path.relative_to(root).as_posix(): path
            for path in sorted(root.rglob("*"))
            if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
        }
        return cls(repo_id, files, gated=gated)

    def push(
        self,
        files: Mapping[str, bytes | Path],
        *,
        revision: str = "main",
        commit: str | None = None,
    ) -> str:
        """Add a commit that holds exactly these files and move a branch to it.

        Returns:
            The commit, 40 hex digits.
        """
        held = {path: RepoFile(path, source) for path, source in sorted(files.items())}
        if commit is None:
            digest = hashlib.sha1(self.repo_id.encode(), usedforsecurity=False)
            for path, file in held.items():
                digest.update(f"\0{path}\0{file.etag}".encode())
            commit = digest.hexdigest()
        self._commits[commit] = held
        self.refs[revision] = commit
        return commit

    @property
    def sha(self) -> str:
        """The commit of `main`, or of the first revision where there is no `main`."""
        return self.refs.get("main") or next(iter(self.refs.values()))

    def commit(self, revision: str) -> str | None:
        """Return the commit a branch, a tag or a commit names; None if there is none."""
        return self.refs.get(revision) or (revision if revision in self._commits else None)

    def files(self, commit: str) -> dict[str, RepoFile]:
        """Return the files of a commit, sorted by path."""
        return self._commits[commit]

    def large_file(self, sha256: str) -> RepoFile | None:
        """Return the large file with this SHA-256, of any commit."""
        return self._find(lambda file: file.is_large and file.sha256 == sha256)

    def xet_file(self, xet_hash: str) -> RepoFile | None:
        """Return the large file with this Xet hash, of any commit."""
        return self._find(lambda file: file.is_large and file.xet_hash == xet_hash)

    def _find(self, wanted: Callable[[RepoFile], bool]) -> RepoFile | None:
        held = (file for files in self._commits.values() for file in files.values())
        return next((file for file in held if wanted(file)), None)

    def is_open(self, path: str) -> bool:
        """Return whether anybody may read this file."""
        return self.gated is False or path in OPEN_FILES
