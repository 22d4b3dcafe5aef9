"""What nodes say of a commit to each other: keys in Ray's key-value store, one namespace.

`has/<node>` says that a node has the files whole, `part/<node>` that it takes them just now and
gives what it has.
"""

from __future__ import annotations

import hashlib

import ray

from serve_app.access.hub.listing import cache
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

    def put(self, name: str, value: str) -> None:
        """Write a key."""
        kv.put(self._prefix + name, value)

    def delete(self, name: str) -> None:
        """Remove a key."""
        kv.delete(self._prefix + name)

    def below(self, folder: str) -> list[str]:
        """Return the names of the keys that begin with `folder/`, without that."""
        prefix = f"{self._prefix}{folder}/"
        return [key.removeprefix(prefix) for key in kv.keys(prefix)]


def member_name() -> str:
    """Return what this process is called among nodes: its node and its cache."""
    place = hashlib.sha256(str(cache()).encode()).hexdigest()[:8]
    return f"{ray.get_runtime_context().get_node_id()}-{place}"


def node_of(name: str) -> str:
    """Return Ray's id of a node that `member_name` named."""
    return name.partition("-")[0]


def is_announced(repo_id: str, commit: str, name: str) -> bool:
    """Return whether a node said that it has a commit, or takes it."""
    keys = Announcements(repo_id, commit)
    return any(keys.get(f"{state}/{name}") is not None for state in ("has", "part"))
