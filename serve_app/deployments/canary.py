"""A version that is tried beside an application, and what the ingresses see of both.

Both sides of it meet in the key-value store: the command says what share of the requests the
canary gets, and each ingress says what became of them, once a second while there is a canary.

    canary/share/<application>            the command's word, `Canary`
    canary/seen/<application>/<ingress>   what one ingress has seen of the present step, `Seen`
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import quote, unquote

from serve_app.cluster import kv
from serve_app.cluster.liveness import Liveness

SUFFIX = "-canary"  # of the name of the application that is tried beside another
SHARES = "canary/share/"
SEEN = "canary/seen/"
SILENT_S = 20.0  # without a report, after which an ingress has ended
_GROWTH = 1.05  # of the bounds of a sketch's buckets: values are known to 2.5 %
_LEAST_S = 1e-5


@dataclass(frozen=True, slots=True)
class Canary:
    """A canary as its ingresses know it.

    Args:
        application: Serve's name of it.
        trial: drawn anew for each canary, so that no two get the same conversations.
        step: counts the changes of the shares; what was seen counts for its own step alone.
        share: of the requests that it answers, 0 to 1.
        shadow: of the others, those that are copied to it, 0 to 1.
        sticky: what stays with one version: `conversation`, `client`, or "" for nothing.
        patience_s: see `RemoteEngine`; `stall_timeout_s` too.
        adapters: names of the adapters that it has.
        commits: of its model, under "", and of its adapters by name, as its gate resolved them.
    """

    application: str
    trial: str
    step: int = 0
    share: float = 0.0
    shadow: float = 0.0
    sticky: str = ""
    patience_s: float = 600.0
    stall_timeout_s: float = 60.0
    adapters: tuple[str, ...] = ()
    commits: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def idle(self) -> bool:
        """Whether it gets no request at all."""
        return self.share <= 0 and self.shadow <= 0


class Sketch:
    """How many values were how large, in buckets that each are 5 % wide.

    Args:
        buckets: counts by the number of their bucket.
    """

    def __init__(self, buckets: Mapping[int, int] | None = None) -> None:
        self.buckets = Counter(buckets or {})

    def add(self, seconds: float) -> None:
        """Count one value."""
        self.buckets[round(math.log(max(seconds, _LEAST_S), _GROWTH))] += 1

    @property
    def count(self) -> int:
        """Return how many there are."""
        return self.buckets.total()

    def over(self, limit_s: float) -> int:
        """Return how many are larger than a limit."""
        return sum(count for bucket, count in self.buckets.items() if _GROWTH**bucket > limit_s)

    def quantile(self, share: float) -> float | None:
        """Return the value that this share of all does not exceed; None without values."""
        wanted, passed = share * self.count, 0
        for bucket in sorted(self.buckets):
            passed += self.buckets[bucket]
            if passed >= wanted:
                return float(_GROWTH**bucket)
        return None


@dataclass(slots=True)
class Seen:
    """What became of one version's requests in one step.

    Args:
        first: seconds to the first token of each request that has one.
        waiting: seconds so far of those that have none: they wait, or their client has left.
        token: mean seconds a token after the first, of each request that has ended.
        failed: requests that ended with an error which is not their client's.
        unanswered: those of them that had no token.
        dropped: copies that were not made, or not taken on.
    """

    first: Sketch = field(default_factory=Sketch)
    waiting: Sketch = field(default_factory=Sketch)
    token: Sketch = field(default_factory=Sketch)
    failed: int = 0
    unanswered: int = 0
    dropped: int = 0

    @property
    def requests(self) -> int:
        """Return how many have a first token or an error."""
        return self.first.count + self.unanswered

    def add(self, other: Seen) -> None:
        """Count what another ingress has seen, too."""
        for name in _SKETCHES:
            getattr(self, name).buckets.update(getattr(other, name).buckets)
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def facts(self) -> dict[str, Any]:
        """Return it as JSON data."""
        facts: dict[str, Any] = {name: dict(getattr(self, name).buckets) for name in _SKETCHES}
        return facts | {name: getattr(self, name) for name in _NUMBERS}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Seen:
        """Read what `facts` returned."""
        sketches: dict[str, Any] = {
            name: Sketch({int(bucket): count for bucket, count in facts[name].items()})
            for name in _SKETCHES
        }
        return cls(**sketches, **{name: facts[name] for name in _NUMBERS})


_SKETCHES = ("first", "waiting", "token")
_NUMBERS = ("failed", "unanswered", "dropped")


@dataclass(frozen=True, slots=True)
class Report:
    """What all ingresses have seen in one step.

    Args:
        ingresses: that know of the step and have not ended.
        unready: those of them for which the canary does not answer.
        stable: of the version that serves.
        canary: of the one that is tried.
    """

    ingresses: int
    unready: int
    stable: Seen
    canary: Seen


def read(application: str) -> Canary | None:
    """Return the canary of an application; None without one.

    Raises:
        RayError: the cluster does not answer; so do all functions here.
    """
    value = kv.get(f"{SHARES}{quote(application, safe='')}")
    if value is None:
        return None
    raw = json.loads(value)
    known = {each.name: raw[each.name] for each in fields(Canary) if each.name in raw}
    return Canary(**known | {"adapters": tuple(raw["adapters"])})


def write(application: str, canary: Canary) -> None:
    """Let every ingress of an application know its canary, within `split.LOOK_S` seconds."""
    kv.put(f"{SHARES}{quote(application, safe='')}", json.dumps(asdict(canary)))


def forget(application: str) -> None:
    """Remove an application's canary and all that was seen of it."""
    kv.delete(f"{SHARES}{quote(application, safe='')}")
    for key in kv.keys(_seen(application)):
        kv.delete(key)


def under_way() -> list[str]:
    """Return the names of the applications that have a canary."""
    return [unquote(key.removeprefix(SHARES)) for key in kv.keys(SHARES)]


def publish(
    application: str, ingress: str, canary: Canary, *, ready: bool, stable: Seen, tried: Seen
) -> None:
    """Say what one ingress has seen of the present step."""
    facts = {
        "trial": canary.trial,
        "step": canary.step,
        "ready": ready,
        "at": time.monotonic(),  # so that each report differs from the one before
        "stable": stable.facts(),
        "canary": tried.facts(),
    }
    kv.put(f"{_seen(application)}{quote(ingress, safe='')}", json.dumps(facts))


def report(application: str, canary: Canary, liveness: Liveness | None = None) -> Report:
    """Add up what the ingresses have seen of a canary's present step.

    Args:
        application: Serve's name of it.
        canary: in this step.
        liveness: of the ingresses, since one that has ended leaves what it saw behind; without it
            every ingress counts as there.
    """
    values = {key: value for key in kv.keys(_seen(application)) if (value := kv.get(key))}
    reports = {
        key: facts
        for key, facts in ((key, json.loads(value)) for key, value in values.items())
        if (facts.get("trial"), facts.get("step")) == (canary.trial, canary.step)
    }
    there = set(reports)
    if liveness is not None:
        there = liveness.alive({key: values[key] for key in reports})
    stable, tried = Seen(), Seen()
    for facts in reports.values():
        stable.add(Seen.of(facts["stable"]))
        tried.add(Seen.of(facts["canary"]))
    return Report(len(there), sum(not reports[key]["ready"] for key in there), stable, tried)


def _seen(application: str) -> str:
    return f"{SEEN}{quote(application, safe='')}/"
