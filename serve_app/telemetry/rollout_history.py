"""The rollout history: what gates, deploys and rollbacks decided, and which grants were lost.

Append-only, in Ray's key-value store: a build and a command end long before anybody scrapes them,
and a blocked rollout leaves no replica that could count it. `serve-app history` lists the entries;
the metrics of rollouts, and the versions that a rollback can go back to, are derived from them.

    history/<application>/<number>    to create the next number is to have recorded

The newest entry of an application carries the totals of all before it, so a count never shrinks
when old entries are dropped. Ingresses use it too, which may not import `rollout/history.py`.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from functools import partial
from typing import Any
from urllib.parse import quote, unquote

import structlog
from ray.exceptions import RayError

from serve_app.access.verdict import UNDETERMINED, Outcome, Verdict
from serve_app.cluster import kv
from serve_app.redaction import sanitise, scrub

log = structlog.get_logger()

PREFIX = "history/"
KEPT = 100  # entries of one application, besides those of its versions
KEPT_VERSIONS = 10  # of one application
ORDER_S = 0.001  # between two entries that the clocks of two machines would put the wrong way round
SHOWN_NODES = 8  # in one sentence
# Who started a job, by the variable that a CI system sets for it.
CI_IDENTITIES = (
    "GITHUB_ACTOR",
    "GITLAB_USER_LOGIN",
    "BUILDKITE_BUILD_CREATOR",
    "CIRCLE_USERNAME",
    "BUILD_REQUESTEDFOR",  # Azure Pipelines
)


class What(StrEnum):
    """What was decided or seen."""

    APPROVED = "approved"  # by the gate of a build
    BLOCKED = "blocked"  # by the gate of a build, or of a command before it touched Serve
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"  # nothing to go back to, or it did not serve again
    CANARY = "canary"  # a step of one has begun, or how it ended if it did not go back
    ACCESS_LOST = "access_lost"
    ACCESS_REGAINED = "access_regained"
    TOKEN_CHANGED = "token_changed"  # noqa: S105 (the file of a token, or of an identity)
    KEYS_CHANGED = "keys_changed"  # the file of API keys


ROLLOUTS = frozenset({What.APPROVED, What.BLOCKED, What.DONE, What.ROLLED_BACK, What.FAILED})


@dataclass(frozen=True, slots=True)
class Total:
    """All entries of one kind of an application.

    Args:
        count: how many, since the cluster started.
        at: Unix seconds of the last one.
        duration_s: of the last one.
    """

    count: int
    at: float
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One entry. `record` sets `number`, `at`, `totals` and, but for the watch, `refused`.

    Args:
        application: its name in Serve.
        what: the decision.
        why: one sentence, sanitised when it is recorded.
        who: a person or a CI identity and the host; `build` and `watch` are the cluster itself.
        commit: of the model that it was about; None if it is not known.
        config_hash: see `config.config_hash`.
        duration_s: of the gate, or of the rollout after it.
        rollout: a count of rollouts that the applications of one rollout share.
        config: of the application: what serves since then, or what did until it was removed; None
            where the entry sets no version.
        config_commit: of the model in `config`; `adapter_commits` of its adapters, by name.
        removed: the application was taken away.
        returns_to: number of the version that was gone back to; that one and all after it no
            longer count, or going back twice would lead forward again.
        number: counts the application's entries from 1.
        at: Unix seconds; later than those of all earlier entries of the application.
        totals: by kind, this entry included.
        refused: outcome by name of each node that the watch last saw refused.
    """

    application: str
    what: What
    why: str
    who: str
    commit: str | None = None
    config_hash: str | None = None
    duration_s: float = 0.0
    rollout: int = 0
    config: dict[str, Any] | None = None
    config_commit: str | None = None
    adapter_commits: Mapping[str, str | None] = field(default_factory=dict)
    removed: bool = False
    returns_to: int | None = None
    number: int = 0
    at: float = 0.0
    totals: Mapping[str, Total] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def config_commits(self) -> dict[str, str | None]:
        """Of the model in `config`, under "", and of its adapters by name."""
        return {"": self.config_commit, **self.adapter_commits}

    def facts(self) -> dict[str, Any]:
        """Return what people and logs may see; a config's variables may hold anything."""
        shown = ("application", "number", "what", "why", "who", "commit", "config_hash")
        facts: dict[str, Any] = {name: getattr(self, name) for name in shown}
        return facts | {"at": round(self.at, 3), "duration_s": round(self.duration_s, 3)}


def record(entry: Entry) -> None:
    """Append an entry; never raises for Ray, because no rollout may fail by being recorded."""

    def follow(newest: Entry | None) -> Entry:
        # An approval means that every node proved its access.
        known = newest.refused if newest and entry.what is not What.APPROVED else {}
        return replace(entry, refused=known)

    try:
        _append(entry.application, follow)
    except RayError:
        log.warning("history.recorded", **entry.facts(), kept=False)


def record_gate(
    applications: Iterable[str],
    verdict: Verdict,
    hashed: str,
    *,
    who: str = "build",
    duration_s: float | None = None,
) -> None:
    """Append what the gate decided; the first line of its table says why.

    Args:
        applications: their names in Serve.
        verdict: over all nodes.
        hashed: `config_hash` of what was asked for.
        who: see `Entry`.
        duration_s: of the gate, where it is more than the verdict's.
    """
    for name in applications:
        record(
            Entry(
                application=name,
                what=What.APPROVED if verdict.approved else What.BLOCKED,
                why=verdict.table().partition("\n")[0],
                who=who,
                commit=verdict.commit,
                config_hash=hashed,
                duration_s=verdict.duration_s if duration_s is None else duration_s,
            )
        )


def record_grants(application: str, verdict: Verdict) -> None:
    """Append which nodes lost or regained their grant, each once whichever ingress saw it first.

    An outcome that is neither yes nor no changes nothing. Where the store does not answer, the
    next round records it.

    Args:
        application: its name in Serve.
        verdict: of a round of the watch.
    """
    asked = {
        node.node_name + (f" ({name})" if name else ""): node.outcome
        for name, part in (("", verdict), *verdict.adapters.items())
        for node in part.nodes
        if node.node_id and not node.deferred
    }
    for what in (What.ACCESS_LOST, What.ACCESS_REGAINED):
        entry = Entry(
            application=application, what=what, why="", who="watch", commit=verdict.commit
        )
        with suppress(RayError):
            _append(application, partial(_changed, entry, asked))


def _changed(entry: Entry, asked: Mapping[str, Outcome], newest: Entry | None) -> Entry | None:
    """Return the entry with the nodes that are new of its kind; None if there are none."""
    known = {name: o for name, o in (newest.refused if newest else {}).items() if name in asked}
    if entry.what is What.ACCESS_LOST:
        no = {n: o.value for n, o in asked.items() if o not in {Outcome.GRANTED, *UNDETERMINED}}
        new = {name: outcome for name, outcome in no.items() if name not in known}
        refused = {**known, **new}
    else:
        new = {n: o.value for n, o in asked.items() if o is Outcome.GRANTED and n in known}
        refused = {name: outcome for name, outcome in known.items() if name not in new}
    return replace(entry, why=_places(new), refused=refused) if new else None


def entries(application: str) -> list[Entry]:
    """Return what is kept of an application, oldest first.

    Raises:
        RayError: the cluster does not answer.
    """
    values = [kv.get(key) for key in kv.keys(_prefix(application))]
    return [_parsed(value) for value in values if value is not None]  # None: dropped meanwhile


def applications() -> list[str]:
    """Return the names of all applications that have a history.

    Raises:
        RayError: the cluster does not answer.
    """
    names = (key.removeprefix(PREFIX).partition("/")[0] for key in kv.keys(PREFIX))
    return sorted({unquote(name) for name in names})


def totals(application: str) -> Mapping[str, Total]:
    """Return the totals of an application by kind.

    Raises:
        RayError: the cluster does not answer.
    """
    newest = _newest(application)
    return newest.totals if newest else {}


def versions(recorded: Iterable[Entry]) -> list[Entry]:
    """Return the entries of one application whose configs served well and count, oldest first.

    The same config again is no new version; its removal, or its return, changes the one there is.
    """
    found: list[Entry] = []
    for entry in recorded:
        if entry.returns_to is not None:
            found = [version for version in found if version.number < entry.returns_to]
        if entry.config is None:
            continue
        if not found or found[-1].config != entry.config:
            found.append(entry)
        elif found[-1].removed != entry.removed:
            found[-1] = replace(found[-1], removed=entry.removed, rollout=entry.rollout)
    return found[-KEPT_VERSIONS:]


def whoami() -> str:
    """Return who runs this process: a CI system's identity or the user, and the host."""
    host = socket.gethostname()
    for name in CI_IDENTITIES:
        if identity := os.environ.get(name):
            return sanitise(f"{identity} ({name}) on {host}", limit=120)
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # a container's user that has no name
        user = f"uid {os.getuid()}"
    return sanitise(f"{user} on {host}", limit=120)


def _append(application: str, follow: Callable[[Entry | None], Entry | None]) -> None:
    """Write what follows an application's newest entry, if anything does, and log it.

    Args:
        application: its name in Serve.
        follow: returns the next entry; called again where somebody else was faster.
    """
    while True:
        newest = _newest(application)
        entry = follow(newest)
        if entry is None:
            return
        at = max(time.time(), newest.at + ORDER_S if newest else 0.0)
        before = newest.totals if newest else {}
        count = 1 + (before[entry.what].count if entry.what in before else 0)
        entry = replace(
            entry,
            why=sanitise(scrub(entry.why)),
            number=1 + (newest.number if newest else 0),
            at=at,
            totals={**before, entry.what.value: Total(count, at, entry.duration_s)},
        )
        key = f"{_prefix(application)}{entry.number:08d}"
        if kv.put(key, json.dumps(asdict(entry)), overwrite=False):
            log.info("history.recorded", **entry.facts(), kept=True)
            _forget(application)
            return


def _forget(application: str) -> None:
    keys = kv.keys(_prefix(application))
    if len(keys) > KEPT:
        counting = {version.number for version in versions(entries(application))}
        for key in keys[:-KEPT]:
            if int(key.rpartition("/")[2]) not in counting:
                kv.delete(key)


def _newest(application: str) -> Entry | None:
    while keys := kv.keys(_prefix(application)):
        if value := kv.get(keys[-1]):
            return _parsed(value)
    return None


def _parsed(value: bytes) -> Entry:
    """Read an entry; what only a newer version of this package knows of it is left out."""
    raw = json.loads(value)
    known = {each.name: raw[each.name] for each in fields(Entry) if each.name in raw}
    what = What(raw["what"]) if raw["what"] in set(What) else raw["what"]
    counted = {kind: Total(**total) for kind, total in raw["totals"].items()}
    return Entry(**known | {"what": what, "totals": counted})


def _prefix(application: str) -> str:
    return f"{PREFIX}{quote(application, safe='')}/"


def _places(outcomes: Mapping[str, str]) -> str:
    """Say which outcome was seen on which nodes: `expired_token on a, b; no_token on c`."""
    by_outcome: dict[str, list[str]] = {}
    for name, outcome in sorted(outcomes.items()):
        by_outcome.setdefault(outcome, []).append(name)
    parts = []
    for outcome, names in by_outcome.items():
        more = f" and {len(names) - SHOWN_NODES} more" if len(names) > SHOWN_NODES else ""
        parts.append(f"{outcome} on {', '.join(names[:SHOWN_NODES])}{more}")
    return "; ".join(parts)
