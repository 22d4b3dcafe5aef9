"""What stands in for the Hub: Artifactory, Nexus, a mirror in the cluster. Known by its answers.

A mirror asks the Hub with an account of its own, so a yes proves what this node may read of the
mirror and nothing about the grant of the node's own account. Of the Hub's answers for files it
often leaves out X-Repo-Commit, which says of which commit they are; then its list of files has to
agree with what it sends. One that passes on every header looks like the Hub.
"""

from __future__ import annotations

from huggingface_hub._tree_cache import TreeCacheEntry

from serve_app.access.hub.client import Failed
from serve_app.access.hub.listing import Entries, described
from serve_app.access.hub.model_files import content_hash
from serve_app.access.verdict import Outcome

UNNAMED = "a mirror"
SMALL_BYTES = 4 << 20


def is_listed(content: bytes, entry: TreeCacheEntry) -> bool:
    """Return whether a file has the bytes that the list of files states."""
    etag = described("", entry).etag
    return content_hash(content, etag) == etag


def small_file(entries: Entries) -> str:
    """Return the name of a file to compare with the list, the model's config if it is there.

    Raises:
        Failed: every file is large or empty.
    """
    sizes = {path: described(path, entry).size for path, entry in entries.items()}
    fitting = [path for path, size in sizes.items() if 0 < size <= SMALL_BYTES]
    if not fitting:
        raise unproven("no small file is listed whose bytes could be compared")
    return "config.json" if "config.json" in fitting else min(fitting, key=lambda path: sizes[path])


def unproven(why: str) -> Failed:
    """Say that nothing proves of which commit a mirror's files are."""
    message = f"nothing says which commit is served: there is no X-Repo-Commit, and {why}"
    return Failed(Outcome.UNKNOWN, message)


def refuse_other_size(entries: Entries, name: str, sent: int | None) -> None:
    """Compare a weights file of a mirror with its list of the commit's files.

    Args:
        entries: the list.
        name: of the file.
        sent: its bytes, as the mirror announced them; None if it did not.

    Raises:
        Failed: it is another file, or is not in the list.
    """
    if name not in entries:
        raise unproven(f"{name} is not in the list of files")
    listed = described(name, entries[name]).size
    if sent != listed:
        words = "no size" if sent is None else f"{sent:,} bytes"
        raise unproven(f"{name} came with {words}, listed are {listed:,}")
