"""What served well before: the configs that a rollout ended with, in the cluster's memory.

A config holds no secret (`config.refuse_secrets`). The newest entry is the one that serves, as
long as nobody went past this command.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

from ray.experimental import internal_kv

from serve_app.ledger import NAMESPACE

KEY = "rollout/history"
KEPT = 10


@dataclass(frozen=True, slots=True)
class Good:
    """A config that ran and answered.

    Args:
        goal: the applications, as Serve reports them.
        since: Unix seconds.
    """

    goal: dict[str, Any]
    since: float


def read() -> list[Good]:
    """Return the good configs, oldest first."""
    value = internal_kv._internal_kv_get(KEY, namespace=NAMESPACE)
    return [Good(**entry) for entry in json.loads(value)] if value else []


def remember(goal: dict[str, Any]) -> None:
    """Note that a config serves."""
    entries = read()
    if not entries or entries[-1].goal != goal:
        _write([*entries, Good(goal, time.time())])


def replace(old: Good) -> None:
    """Let the newest entry stand for an old one that was gone back to.

    What came between served worse; without this, going back twice would go to it again.
    """
    entries = read()
    if old in entries:
        _write([*entries[: entries.index(old)], entries[-1]])


def former(serving: dict[str, Any] | None) -> Good | None:
    """Return the newest good config that is not the one that serves."""
    return next((entry for entry in reversed(read()) if entry.goal != serving), None)


def _write(entries: list[Good]) -> None:
    value = json.dumps([asdict(entry) for entry in entries[-KEPT:]])
    internal_kv._internal_kv_put(KEY, value, namespace=NAMESPACE)
