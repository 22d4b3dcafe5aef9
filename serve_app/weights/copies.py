"""Copies of a model that another tool made: what the cache's own names say of them.

huggingface_hub's cache names each content by its hash, so a commit's folder of links can be
verified although nobody kept the Hub's listing of it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from serve_app.access.hub.listing import HubFile
from serve_app.access.local import check_directory
from serve_app.access.verdict import Outcome

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
MAX_FILES = 10_000


def linked_files(snapshot: Path) -> tuple[HubFile, ...] | None:
    """Return what a commit's folder holds, if that is a whole model; None if not.

    Args:
        snapshot: the commit's folder in the cache.

    Returns:
        Its files that are links to blobs, with the hashes that those are named by.
    """
    if check_directory(str(snapshot)).outcome is not Outcome.GRANTED:
        return None
    found: list[HubFile] = []
    for folder, _, names in os.walk(snapshot):
        for name in names:
            path = Path(folder) / name
            if not path.is_symlink() or len(found) >= MAX_FILES:
                continue
            blob = path.readlink().name
            if _HASH.fullmatch(blob) and path.is_file():
                relative = path.relative_to(snapshot).as_posix()
                found.append(HubFile(relative, path.stat().st_size, blob))
    return tuple(found) or None
