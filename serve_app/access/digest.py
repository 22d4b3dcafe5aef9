r"""One hash for all files of a commit, the same on the Hub and in a directory.

    digest = "sha256:" + SHA-256 of, for each file in the order of its path's UTF-8 bytes,
             PATH "\0" KIND ":" HEX "\n"

KIND and HEX are `sha256` and the content's SHA-256 for files in large-file storage, else `git-sha1`
and the content's Git blob id: what the Hub lists, and what a download is verified by.

Of a directory all files below it count but those in `.git` and `.cache` at its top. Which of
them are large files is read from where it stands: a link into a cache of blobs is named by the
hash, else `.gitattributes` decides, else names and sizes as the Hub's own default does it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import constants

from serve_app.access.hub.folders import Folder
from serve_app.access.hub.listing import ENTRIES, Entries
from serve_app.access.hub.model_files import content_hasher
from serve_app.checkpoint.files import MIB, read_limited
from serve_app.errors import ModelLoadError

UNASKED = "sha256:" + "0" * 64  # no commit has it: wanting it asks for what a commit's digest is
_PLACE = (".serve-app", "hashed")  # in the cache: what the files of directories were
_NOT_FILES = frozenset({".git", ".cache"})
_LARGE = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.h5", "*.onnx", "*.msgpack")
_LARGE_BYTES = 10 * MIB
_PIECE = 4 * MIB
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def digest_of(hashes: Mapping[str, str]) -> str:
    """Return the digest of files.

    Args:
        hashes: by path; 64 hex digits are a SHA-256, 40 a Git blob id.
    """
    whole = hashlib.sha256()
    for path in sorted(hashes, key=lambda name: name.encode("utf-8", "surrogateescape")):
        kind = "sha256" if len(hashes[path]) == 64 else "git-sha1"
        line = f"{path}\0{kind}:{hashes[path]}\n"
        whole.update(line.encode("utf-8", "surrogateescape"))
    return f"sha256:{whole.hexdigest()}"


def listing_digest(entries: Entries) -> str:
    """Return the digest of a commit, from a checked listing of it."""
    return digest_of(listed_hashes(entries))


def listed_hashes(entries: Entries) -> dict[str, str]:
    """Return the hash of each file by its path, from a checked listing."""
    return {path: entry.lfs_sha256 or entry.blob_id for path, entry in entries.items()}


def directory_digest(directory: Path) -> str:
    """Return the digest of a directory, from its bytes; see `directory_hashes`."""
    return digest_of(directory_hashes(directory))


def directory_hashes(directory: Path) -> dict[str, str]:
    """Return the hash of each file of a directory by its path, from its bytes, as a digest has it.

    Each file is read once and remembered by its size, time and inode, so the next time is fast.

    Raises:
        ModelLoadError: a file cannot be read, or there are too many.
    """
    root = directory.expanduser().resolve()
    known = _recall(root)
    large = _attributes(root)
    notes: dict[str, tuple[str, str]] = {}
    try:
        for name, path in _files(root):
            identity, counts_whole = _identity(path), _is_large(name, path, large)
            noted = known.get(name, ("", ""))
            if noted[0] == identity and len(noted[1]) == (64 if counts_whole else 40):
                notes[name] = noted
                continue
            notes[name] = (identity, _hash(path, is_large=counts_whole))
            if counts_whole:  # so that a check that is cut short has not read it for nothing
                _remember(root, known | notes)
    except OSError as error:
        raise ModelLoadError(f"{error.filename or root}: {error.strerror}") from None
    if notes != known:
        _remember(root, notes)
    return {name: found for name, (_, found) in notes.items()}


def digest_fault(wanted: str | None, found: str | None) -> str | None:
    """Return how a digest differs from `model.digest`, in one sentence; None if it does not."""
    if wanted is None or found == wanted:
        return None
    return f"the files have the digest {found}, and model.digest is {wanted}"


def _files(root: Path) -> Iterator[tuple[str, Path]]:
    found = 0
    for folder, folders, names in os.walk(root):
        if Path(folder) == root:
            folders[:] = [name for name in folders if name not in _NOT_FILES]
        for name in sorted(names):
            found += 1
            if found > ENTRIES:
                raise ModelLoadError(f"{root} has more than {ENTRIES:,} files")
            path = Path(folder) / name
            if not path.is_file():  # nothing, or something that would be waited for
                raise ModelLoadError(f"{path} is no file that can be read")
            yield path.relative_to(root).as_posix(), path


def is_large(name: str, size: int, rules: list[tuple[str, bool]] | None) -> bool:
    """Return whether a file counts by its content's SHA-256, and not as a Git blob.

    Args:
        name: below the top folder.
        size: bytes.
        rules: of .gitattributes; None where there is none.
    """
    if rules is not None:
        return next((found for rule, found in rules if _matches(rule, name)), False)
    base = name.rpartition("/")[2]
    return any(fnmatchcase(base, each) for each in _LARGE) or size > _LARGE_BYTES


def large_rules(content: bytes) -> list[tuple[str, bool]]:
    """Return the rules of a .gitattributes about large files, last first."""
    rules = []
    for line in content.decode("utf-8", "replace").splitlines():
        pattern, *marks = line.split() or [""]
        if any(mark.removeprefix("-").removeprefix("!").startswith("filter") for mark in marks):
            rules.append((pattern, "filter=lfs" in marks))
    return rules[::-1]


def _is_large(name: str, path: Path, attributes: list[tuple[str, bool]] | None) -> bool:
    if path.is_symlink() and _HASH.fullmatch(blob := path.readlink().name):
        return len(blob) == 64
    return is_large(name, path.stat().st_size, attributes)


def _attributes(root: Path) -> list[tuple[str, bool]] | None:
    """Return the rules of .gitattributes about large files, last first; None without the file."""
    place = root / ".gitattributes"
    try:
        content = read_limited(place, MIB)
    except (OSError, ModelLoadError):
        return None
    return large_rules(content) if place.is_file() else None


def _matches(pattern: str, name: str) -> bool:
    """Return whether a pattern of .gitattributes means a file; without `/` by its name alone."""
    if "/" not in pattern:
        return fnmatchcase(name.rpartition("/")[2], pattern)
    return fnmatchcase(name, pattern.removeprefix("/").replace("**/", "*"))


def _hash(path: Path, *, is_large: bool) -> str:
    with path.open("rb") as stream:
        digest = content_hasher(os.fstat(stream.fileno()).st_size, is_large=is_large)
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return str(digest.hexdigest())


def _identity(path: Path) -> str:
    """Return what changes whenever a file is written or replaced."""
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def _note(root: Path) -> str:
    return hashlib.sha256(os.fsencode(root)).hexdigest()[:32] + ".json"


def _recall(root: Path) -> dict[str, tuple[str, str]]:
    place = Path(constants.HF_HUB_CACHE).joinpath(*_PLACE, _note(root))
    try:
        notes = json.loads(place.read_text(encoding="utf-8"))
        return {name: (str(at), str(found)) for name, (at, found) in notes.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # nothing noted here, or nothing that can be read: hashed again


def _remember(root: Path, notes: Mapping[str, tuple[str, str]]) -> None:
    # A full or read-only disk only costs hashing it once more.
    with suppress(OSError), Folder.at(Path(constants.HF_HUB_CACHE), *_PLACE, create=True) as place:
        place.write(_note(root), json.dumps(notes))
