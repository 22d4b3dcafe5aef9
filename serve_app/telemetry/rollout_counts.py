"""How the rollouts of each application ended, in the cluster's memory.

A build and a command end long before anybody scrapes them, and a blocked one leaves no replica
that could count it. So each writes its end into Ray's key-value store, and the ingress that
serves meanwhile exports it. One key for each application and result, named by the count: to
create the next number is to have counted, so that no two writers take the same one.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum

from ray.exceptions import RayError

from serve_app.cluster import kv

PREFIX = "rollouts/"
ORDER_S = 0.001  # between two ends that the clocks of two machines would put the wrong way round


class Result(StrEnum):
    """How a gate or a rollout ended."""

    APPROVED = "approved"  # the gate of a build
    BLOCKED = "blocked"  # the gate of a build, or of a command before it touched Serve
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"  # nothing to go back to, or it did not come back


@dataclass(frozen=True, slots=True)
class Ends:
    """The rollouts of one application that ended alike.

    Args:
        count: how many, since the cluster started.
        at: Unix seconds of the last one.
        duration_s: of the last one.
    """

    count: int
    at: float
    duration_s: float


def note(application: str, result: Result, *, duration_s: float) -> None:
    """Count one end; never raises for Ray, because no rollout may fail by being counted.

    It is dated after all that was counted before, whatever the clock of this machine says: which
    of two results is the later one decides whether somebody is woken.
    """
    prefix = f"{PREFIX}{application}/{result}/"
    with suppress(RayError):
        before = max((ends.at for ends in told(application).values()), default=0.0)
        at = max(time.time(), before + ORDER_S)
        number = max(_numbers(prefix), default=0) + 1
        while not kv.put(
            f"{prefix}{number}",
            json.dumps(asdict(Ends(number, at, duration_s))),
            overwrite=False,
        ):  # somebody else counted this one at the same moment
            number += 1
        for old in _numbers(prefix):
            if old < number:
                kv.delete(f"{prefix}{old}")


def told(application: str) -> dict[Result, Ends]:
    """Return what was counted of an application, by result.

    Raises:
        RayError: the cluster does not answer.
    """
    prefix, newest = f"{PREFIX}{application}/", dict[str, int]()
    for key in kv.keys(prefix):
        result, _, counted = key.removeprefix(prefix).partition("/")
        newest[result] = max(int(counted), newest.get(result, 0))
    found = {}
    for result, number in newest.items():
        value = kv.get(f"{prefix}{result}/{number}")
        if value is not None:  # counted on meanwhile
            found[Result(result)] = Ends(**json.loads(value))
    return found


def _numbers(prefix: str) -> list[int]:
    return [int(key.removeprefix(prefix)) for key in kv.keys(prefix)]
