"""Names of files as a repository lists them: a stranger's words, checked before use.

Two classes of faults. A name that leads out of its folder is never a repository's: the whole
listing is refused. A name that is merely odd (control characters, reserved words, letters that
two file systems read differently) is refused where a file would be stored under it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

PART_BYTES = 255  # of a name on every common file system
PATH_BYTES = 1024
DEPTH = 16
# Devices on Windows, with any extension; a cache may lie on a share that it serves.
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?")


def escape_fault(path: object) -> str | None:
    """Say why a listed name is none that a Git repository can hold; None if it is one.

    Args:
        path: what the listing says, of any type.
    """
    if not isinstance(path, str):
        return "is no text"
    parts = path.split("/")
    faults = {
        "is no valid Unicode": re.search(r"[\ud800-\udfff]", path),
        "holds a NUL character": "\0" in path,
        "is an absolute path": path.startswith("/"),
        "has an empty part": "" in parts,
        "has a part that names a folder above or the same one": {".", ".."} & set(parts),
    }
    return next((fault for fault, found in faults.items() if found), None)


def store_fault(path: str) -> str | None:
    """Say why no file is stored under a name; None if one may be.

    Args:
        path: with `/`, relative to the folder of the commit.
    """
    parts = path.split("/")
    if fault := escape_fault(path):
        return fault
    if len(path.encode()) > PATH_BYTES or len(parts) > DEPTH:
        return f"is longer than {PATH_BYTES} bytes or deeper than {DEPTH} folders"
    return next((fault for part in parts if (fault := _part_fault(part))), None)


def _part_fault(part: str) -> str | None:
    if len(part.encode()) > PART_BYTES:
        return f"has a part longer than {PART_BYTES} bytes"
    if "\\" in part or not part.isprintable():
        return "holds a backslash or an invisible character"
    if part[0] in ".~" or part[-1] in ". " or part[0] == " " or _DEVICES.fullmatch(part):
        return "has a reserved part"
    return None


def conflict(paths: Iterable[str]) -> str | None:
    """Say which of the names cannot stand beside another one; None if all can.

    A name is the same as another if only letter case or Unicode composition makes the difference,
    and a file cannot be a folder of another file.
    """
    seen: dict[str, str] = {}
    for path in paths:
        key = _key(path)
        if key in seen:
            return (
                f"{shown(seen[key])} and {shown(path)} differ by letter case alone, or not at all"
            )
        seen[key] = path
    for path in seen.values():
        parts = path.split("/")
        for end in range(1, len(parts)):
            if (other := seen.get(_key("/".join(parts[:end])))) is not None:
                return f"{shown(other)} is a file and the folder of {shown(path)}"
    return None


def shown(path: object) -> str:
    """Return a foreign name for a message: ASCII, quoted, shortened."""
    text = ascii(path if isinstance(path, str) else type(path).__name__)
    return text if len(text) <= 80 else f"{text[:76]}...'"


def _key(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
