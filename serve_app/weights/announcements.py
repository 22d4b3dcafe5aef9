"""What nodes say of a commit to each other: keys in Ray's key-value store, one namespace.

`has/<node>` says that a node has the files whole, `claim/<n>` that somebody fetches them.
"""

from __future__ import annotations

from serve_app.cluster import kv


class Announcements:
    """The keys of one commit.

    Args:
        repo_id: the repository.
        commit: 40 hex digits.
    """

    def __init__(self, repo_id: str, commit: str) -> None:
        self._prefix = f"weights/{repo_id}@{commit}/"

    def get(self, name: str) -> bytes | None:
        """Return a key's value; None without one."""
        return kv.get(self._prefix + name)

    def put(self, name: str, value: str, *, overwrite: bool = True) -> bool:
        """Write a key; False if it was there already."""
        return kv.put(self._prefix + name, value, overwrite=overwrite)

    def delete(self, name: str) -> None:
        """Remove a key."""
        kv.delete(self._prefix + name)

    def below(self, folder: str) -> list[str]:
        """Return the names of the keys that begin with `folder/`, without that."""
        prefix = f"{self._prefix}{folder}/"
        return [key.removeprefix(prefix) for key in kv.keys(prefix)]


def is_announced(repo_id: str, commit: str, node_id: str) -> bool:
    """Return whether a node said that it has a commit."""
    return Announcements(repo_id, commit).get(f"has/{node_id}") is not None
