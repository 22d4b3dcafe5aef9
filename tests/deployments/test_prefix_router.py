"""Which replica a request goes to: by its beginning, within a bound, as replicas come and go."""

import asyncio
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import (
    DeploymentHandleSource,
    DeploymentID,
    ReplicaID,
    RequestMetadata,
)
from ray.serve.request_router import PendingRequest

from serve_app.app import _routing
from serve_app.config import ReplicaConfig
from serve_app.deployments.engine_client import ANY_REPLICA
from serve_app.deployments.prefix_router import (
    QUESTION,
    PrefixRouter,
    bound,
    key_of,
    ranked,
)
from serve_app.protocol import ChatPrompt, GenerationRequest, TextPrompt

SERVER = DeploymentID("LLMServer", "llm")
NAMES = [f"replica-{number}" for number in range(5)]
KEYS = [f"key {number}".encode() for number in range(600)]


def asks(text, **request):
    """Return the arguments of a replica's call."""
    prompt = ChatPrompt(({"role": "user", "content": text},))
    return [GenerationRequest("r", prompt, **request), None]


def test_key_is_of_the_client_the_adapter_and_the_beginning():
    """Nothing else of a request counts, and no text can be read from it."""
    key = key_of(asks("Hello"))
    assert len(key) == 16
    assert key == key_of([replace(asks("Hello")[0], request_id="other", n=2), object()])
    others = [asks("Good day"), asks("Hello", client="you"), asks("Hello", adapter="french")]
    assert len({key, *map(key_of, others)}) == 4
    long = "word " * QUESTION
    assert key_of(asks(long + "What?")) == key_of(asks(long + "Why?"))
    assert key_of(asks("\ud800")) != key  # half a character, as clients may send it


def test_key_is_none_where_any_replica_does():
    """Questions about tokens, and about readiness."""
    assert key_of([]) is None
    assert key_of([TextPrompt("Hello")]) is None


def first(key, in_flight):
    return ranked(key, in_flight)[0][0]


@given(
    replicas=st.integers(1, 8),
    events=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.booleans()), max_size=300),
)
def test_ranked_holds_the_bound(replicas, events):
    """Whatever comes and ends: no replica above it gets a request, and none is left out."""
    in_flight = dict.fromkeys((f"replica-{number}" for number in range(replicas)), 0)
    for key, which, ends in events:
        running = [name for name, count in in_flight.items() if count]
        if ends and running:
            in_flight[running[which % len(running)]] -= 1
            continue
        ranks = ranked(b"%d" % key, in_flight)
        assert sorted(name for rank in ranks for name in rank) == sorted(in_flight)
        most = bound(sum(in_flight.values()), replicas)
        chosen = ranks[0][0]
        assert in_flight[chosen] < most
        ideal = first(b"%d" % key, dict.fromkeys(in_flight, 0))
        assert chosen == ideal or in_flight[ideal] >= most
        in_flight[chosen] += 1


def test_ranked_changes_only_the_share_of_a_replica_that_comes_or_goes():
    """A fifth of the keys each; those of the others stay where they are."""
    five = {key: first(key, dict.fromkeys(NAMES, 0)) for key in KEYS}
    four = {key: first(key, dict.fromkeys(NAMES[:-1], 0)) for key in KEYS}
    assert all(80 < count < 160 for count in Counter(five.values()).values())
    moved = {key for key in KEYS if five[key] != four[key]}
    assert moved == {key for key in KEYS if five[key] == NAMES[-1]}
    assert set(Counter(four[key] for key in moved)) == set(NAMES[:-1])  # to all of the others


def test_bound_is_near_the_mean():
    """A quarter above it, and two requests."""
    assert bound(0, 3) == 3
    assert bound(29, 3) == 15
    assert bound(299, 3) == 127


class Replica(SimpleNamespace):
    """A running replica as Serve's router sees it."""

    async def get_queue_len(self, *, deadline_s):
        return 0


class Routing:
    """The router of an ingress, called as Serve 2.60 does."""

    def __init__(self, *names):
        self.router = PrefixRouter(
            SERVER, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        self.run_on(*names)

    def run_on(self, *names):
        self.router.update_replicas(
            [
                Replica(replica_id=ReplicaID(name, SERVER), max_ongoing_requests=100)
                for name in names
            ]
        )

    async def send(self, arguments, session=""):
        """Return the name of the replica that gets a call, one of the same HTTP request."""
        metadata = RequestMetadata("one request", "one request", session_id=session)
        pending = PendingRequest(args=arguments, kwargs={}, metadata=metadata)
        async with asyncio.timeout(5):
            replica = await self.router._choose_replica_for_request(pending)
        self.router.on_send_request(replica.replica_id)
        return replica.replica_id.unique_id

    def end(self, name):
        self.router.on_request_completed(ReplicaID(name, SERVER), "one request")


async def test_router_lets_a_conversation_meet_one_replica():
    """The one that all ingresses choose; the conversations are spread."""
    here, there = Routing(*NAMES), Routing(*reversed(NAMES))
    met = set()
    for number in range(20):
        names = set()
        for routing in (here, there, here):
            names.add(await routing.send(asks(f"Question {number}")))
            routing.end(*names)
        assert len(names) == 1
        met |= names
    assert len(met) > 2


async def test_router_holds_the_bound_in_a_burst():
    """Calls that come at the same moment count for each other, those of one request too."""
    routing = Routing(*NAMES[:3])
    await routing.send([])  # so that the lines are known
    names = await asyncio.gather(*(routing.send(asks("Hello")) for _ in range(30)))
    assert len(names) == 30
    assert max(Counter(names).values()) <= bound(30, 3)


async def test_router_gives_each_of_many_calls_its_own_replica():
    """Calls that are routed at the same time do not get each other's."""
    routing = Routing(*NAMES)
    alone = {}
    for number in range(8):
        alone[number] = await routing.send(asks(f"Question {number}"))
        routing.end(alone[number])
    names = await asyncio.gather(*(routing.send(asks(f"Question {n}")) for n in alone))
    assert names == list(alone.values())


async def test_router_forgets_what_has_ended_and_who_has_gone():
    """What it keeps is one number for each replica that runs."""
    routing = Routing(*NAMES)
    gone = await routing.send(asks("Hello"))
    for _ in range(9):
        routing.end(gone)  # once too often is nothing
    assert not +routing.router._in_flight
    routing.run_on(*set(NAMES) - {gone})
    routing.end(gone)
    other = await routing.send(asks("Hello"))
    assert other != gone
    routing.run_on(*NAMES)
    assert await routing.send(asks("Hello")) == gone
    assert len(routing.router._in_flight) == len(NAMES)


async def test_router_asks_the_next_one_where_a_replica_is_full():
    """It has as many as it may take from all ingresses; the others are not."""
    routing = Routing(*NAMES)
    ideal = await routing.send(asks("Hello"))
    routing.end(ideal)

    async def full(*, deadline_s):
        return 100

    replica = routing.router.curr_replicas[ReplicaID(ideal, SERVER)]
    replica.get_queue_len = full
    routing.router.on_new_queue_len_info(replica.replica_id, 100)
    second = await routing.send(asks("Hello"))
    assert second == ranked(key_of(asks("Hello")), dict.fromkeys(NAMES, 0))[1][0]


@pytest.mark.parametrize(
    ("arguments", "session"), [([TextPrompt("Hello")], ""), (asks("Hello"), ANY_REPLICA)]
)
async def test_router_sends_other_calls_to_any_replica(arguments, session):
    """The shorter line of two, as Serve's own: of a question about tokens, of a second try."""
    routing = Routing(*NAMES)
    names = set()
    for _ in range(60):
        names.add(name := await routing.send(arguments, session))
        routing.router.decrement_queue_len_cache(ReplicaID(name, SERVER))
    assert names == set(NAMES)


@pytest.mark.parametrize("routing", ["balanced", "prefix"])
def test_routing_reaches_serve(routing):
    """As the class that an ingress makes its router of; by default nothing is said."""
    options = _routing(ReplicaConfig(routing=routing))
    if routing == "balanced":
        assert options == {}
        return
    router = options["request_router_config"].get_request_router_class()
    assert (router.__module__, router.__name__) == (PrefixRouter.__module__, "PrefixRouter")
