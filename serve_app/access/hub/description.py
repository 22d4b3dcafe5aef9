"""What the Hub says of a commit to everybody: its id, the names of its files, the model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app.access.hub.client import Failed
from serve_app.access.verdict import Outcome
from serve_app.checkpoint.names import escape_fault, shown

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


@dataclass(frozen=True, slots=True)
class Description:
    """A model description, checked.

    Args:
        commit: 40 hex digits.
        names: of the commit's files.
        sizes: bytes of those whose sizes it states.
        repo_id: what the Hub calls the repository; None if it says nothing that could be one.
        card: what the description says besides.
    """

    commit: str
    names: frozenset[str]
    sizes: Mapping[str, int]
    repo_id: str | None
    card: Mapping[str, Any]


def read_description(payload: Mapping[str, Any], pinned: str | None) -> Description:
    """Read a model description.

    Args:
        payload: the JSON object of the answer.
        pinned: the commit that was asked for, if one was.

    Raises:
        Failed: it names no commit, no files, another commit, or a file that cannot be one.
    """
    commit, siblings = payload.get("sha"), payload.get("siblings")
    is_list = isinstance(siblings, list) and all(isinstance(each, dict) for each in siblings)
    if not (isinstance(commit, str) and _COMMIT.fullmatch(commit)) or not is_list:
        raise Failed(Outcome.UNKNOWN, "the model description names no commit or no files")
    if pinned not in (None, commit):  # a mirror that is behind
        message = f"asked for commit {pinned}, was named about {commit}"
        raise Failed(Outcome.UNKNOWN, message)
    entries: list[dict[str, Any]] = siblings or []
    name = payload.get("id")
    is_name = isinstance(name, str) and _REPO.fullmatch(name)
    return Description(commit, _names(entries), _sizes(entries), name if is_name else None, payload)


def _names(siblings: list[dict[str, Any]]) -> frozenset[str]:
    names = {name for entry in siblings if isinstance(name := entry.get("rfilename"), str)}
    for name in names:
        if fault := escape_fault(name):
            message = f"the model description lists a file whose name {fault}: {shown(name)}"
            raise Failed(Outcome.UNKNOWN, message)
    return frozenset(names)


def _sizes(siblings: list[dict[str, Any]]) -> dict[str, int]:
    stated = {entry.get("rfilename"): entry.get("size") for entry in siblings}
    return {
        name: size
        for name, size in stated.items()
        if isinstance(name, str) and isinstance(size, int) and size >= 0
    }
