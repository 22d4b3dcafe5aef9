"""What the ingresses of an application tell each other of their keys' use, every second.

    keys/<application>/<ingress>    the number of its round, and its counts by name

While the cluster's memory does not answer, each goes on with what it heard last.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from urllib.parse import quote

from ray.exceptions import RayError

from serve_app.api.key_limits import ROUND_S, Counts, KeyLimits
from serve_app.cluster import kv
from serve_app.cluster.liveness import Liveness

PREFIX = "keys/"
LOST_S = 5.0  # without a new round an ingress is gone


class KeyExchange:
    """One ingress' part in it.

    Args:
        application: Serve's name of it.
        ingress: which one this is.
        limits: what is counted here.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        application: str,
        ingress: str,
        limits: KeyLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # Quoted: with a slash one name could be the beginning of another.
        self._prefix = f"{PREFIX}{quote(application, safe='')}/"
        self._own = f"{self._prefix}{quote(ingress, safe='')}"
        self._limits = limits
        self._rounds = 0
        self._others = Liveness(LOST_S, clock)

    async def run(self) -> None:
        """Make rounds until cancelled."""
        while True:
            await self.round()
            await asyncio.sleep(ROUND_S)

    async def round(self) -> None:
        """Tell the others what is counted here, and hear what they count."""
        mine = self._limits.publish()
        try:
            self._limits.learn(await asyncio.to_thread(self._swap, mine))
        except RayError:
            self._others.forget()  # nobody could say anything; that makes nobody gone

    def leave(self) -> None:
        """Let the others have the limits for themselves at once; never raises for Ray."""
        with suppress(RayError):
            kv.delete(self._own)

    def _swap(self, mine: Mapping[str, Counts]) -> list[dict[str, Counts]]:
        self._rounds += 1
        kv.put(self._own, json.dumps([self._rounds, mine]))
        others = {
            key: said for key in kv.keys(self._prefix) if key != self._own and (said := kv.get(key))
        }
        alive = self._others.alive(others)
        for key in others.keys() - alive:
            kv.delete(key)
        return [_counts(said) for key, said in others.items() if key in alive]


def _counts(said: bytes) -> dict[str, Counts]:
    return {name: Counts(*counts) for name, counts in json.loads(said)[1].items()}
