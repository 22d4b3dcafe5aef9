"""Serve's request router for `replica.routing: prefix`.

Requests that begin alike go to one replica, whose prefix cache has their beginning, unless it has
clearly more to do than the others. Which one that is follows from the beginning and the names of
the replicas alone (rendezvous hashing: Thaler and Ravishankar, 1998), so that all ingresses agree
without messages, and a replica that comes or goes changes its own share. The bound is that of
consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import (
    FIFOMixin,
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from serve_app.deployments.conversation import opening
from serve_app.deployments.engine_client import ANY_REPLICA
from serve_app.protocol import GenerationRequest

QUESTION = 1024  # characters: who asks several things about one long text begins alike
# How far above the mean a replica may be: a share, and requests, which alone count where few run.
SPREAD, LEEWAY = 1.25, 2


class PrefixRouter(FIFOMixin, RequestRouter):
    """Chooses a replica by the beginning of the prompt, within a bound.

    A request's text stays in its hash, which nobody sees. What is counted is what this process has
    sent, so that the bound holds for each ingress and therefore for their sum. Ray's own
    `PrefixCacheAffinityRouter` keeps the texts in an actor, and Ray 2.60 mixes up calls of one
    HTTP request (several prompts) where requests are not fulfilled in their order (`FIFOMixin`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._in_flight: Counter[ReplicaID] = Counter()
        self._turns = asyncio.Lock()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas that are asked for room, in this order; see `ranked`."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # once none of them has room
        key = None
        if pending_request is not None and pending_request.metadata.session_id != ANY_REPLICA:
            key = key_of(pending_request.args)
        if key is None:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        async with self._turns:
            # What was chosen just before is sent, and counted, when the loop comes round.
            await asyncio.sleep(0)
            named = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
            in_flight = {name: self._in_flight[each.replica_id] for name, each in named.items()}
            return [[named[name] for name in rank] for rank in ranked(key, in_flight)]

    def on_send_request(self, replica_id: ReplicaID) -> None:
        """Count a request that is sent."""
        super().on_send_request(replica_id)
        self._in_flight[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Count it no more, however it ended; Ray says so of one that could not be sent, too."""
        super().on_request_completed(replica_id, internal_request_id)
        self._in_flight[replica_id] = max(0, self._in_flight[replica_id] - 1)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take over which replicas run, and forget the others."""
        super().update_replicas(replicas)
        self._in_flight = Counter(
            {each.replica_id: self._in_flight[each.replica_id] for each in replicas}
        )


def key_of(arguments: list[Any]) -> bytes | None:
    """Return what requests have in common that are to meet: who asks, the adapter, the beginning.

    Clients do not share replicas by what they write, so that none learns from its place whether
    another wrote the same.

    Args:
        arguments: of a call of a replica.

    Returns:
        None where any replica does.
    """
    if not arguments or not isinstance(request := arguments[0], GenerationRequest):
        return None
    beginning = repr((request.client, request.adapter, opening(request.prompt, QUESTION)))
    return hashlib.blake2b(beginning.encode(errors="surrogatepass"), digest_size=16).digest()


def bound(in_flight: int, replicas: int) -> int:
    """Return how many requests a replica may have.

    Args:
        in_flight: requests that all of them have, without the one that comes.
        replicas: how many there are, >= 1.
    """
    return math.ceil(SPREAD * (in_flight + 1) / replicas) + LEEWAY


def ranked(key: bytes, in_flight: Mapping[str, int]) -> list[list[str]]:
    """Return the replicas in the order in which a request tries them.

    Args:
        key: see `key_of`.
        in_flight: requests of each replica, at least one replica.

    Returns:
        Those below the bound one by one, in an order of the key's own; the others together, from
        which the one with the shortest line is taken if none of the first answers.
    """
    most = bound(sum(in_flight.values()), len(in_flight))
    order = sorted(in_flight, key=lambda name: _score(key, name), reverse=True)
    full = [name for name in order if in_flight[name] >= most]
    return [[name] for name in order if in_flight[name] < most] + [full] * bool(full)


def _score(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(name.encode(), key=key, digest_size=8).digest()
