"""What ingresses tell each other of keys: counts arrive, and who is gone counts no more."""

import pytest

from serve_app.api.key_limits import Counts, KeyLimits
from serve_app.api.keys import Key
from serve_app.deployments.key_exchange import LOST_S, KeyExchange
from serve_app.errors import KeyLimitExceeded

KEY = Key("a", rpm=10)


class Ingress:
    """One of several over the same store."""

    def __init__(self, name, clock, application="llm"):
        self.limits = KeyLimits(clock)
        self.exchange = KeyExchange(application, name, self.limits, clock)

    def answered(self, times):
        return sum(self._post() for _ in range(times))

    def _post(self):
        try:
            with self.limits.admitted(KEY):
                return True
        except KeyLimitExceeded:
            return False


@pytest.fixture
def now():
    return [0.0]


@pytest.fixture
def two(kv_store, now):
    return [Ingress(name, lambda: now[0]) for name in ("i1", "i2")]


async def rounds(ingresses, now, times=1):
    for _ in range(times):
        now[0] += 1
        for ingress in ingresses:
            await ingress.exchange.round()


async def test_key_exchange_two_ingresses_hold_one_limit(two, now):
    """Each has its half; what one has used is gone for the other."""
    await rounds(two, now, 2)
    assert two[0].answered(20) == 5
    await rounds(two, now)
    assert two[1].answered(20) == 3  # of five that are left
    await rounds(two, now, 3)
    assert two[0].answered(20) + two[1].answered(20) <= 3


async def test_key_exchange_other_applications_count_apart(two, now, kv_store):
    """One cluster has many."""
    stranger = Ingress("i3", lambda: now[0], application="llm-2")
    await rounds([*two, stranger], now, 2)
    assert stranger.answered(20) == 10
    await rounds([*two, stranger], now, 2)
    assert two[0].answered(20) == 5


async def test_key_exchange_an_ingress_that_left_leaves_the_limits(two, now, kv_store):
    """At once if it says so, after some seconds if it was lost; nothing of it stays."""
    await rounds(two, now, 2)
    two[1].exchange.leave()
    await rounds(two[:1], now)
    assert two[0].answered(20) == 10
    lost = Ingress("i3", lambda: now[0])
    await rounds([*two[:1], lost], now, 2)
    assert two[0].limits._others == [{}]
    await rounds(two[:1], now, int(LOST_S) + 2)
    assert two[0].limits._others == []
    assert list(kv_store.held) == ["keys/llm/i1"]


async def test_key_exchange_goes_on_without_the_cluster(two, now, kv_store):
    """With what it heard last; nobody gets more than that leaves."""
    await rounds(two, now, 2)
    assert two[1].answered(4) == 4
    await rounds(two, now, 2)
    kv_store.is_lost = True
    await rounds(two, now, 20)
    assert [ingress.answered(20) for ingress in two] == [3, 3]
    two[0].exchange.leave()
    kv_store.is_lost = False
    await rounds(two, now)
    assert [two[0].limits._others, two[1].limits._others] == [
        [{"a": Counts(rpm=4)}],
        [{"a": Counts(rpm=3)}],
    ]


async def test_key_exchange_application_whose_name_begins_like_another(kv_store, now):
    """A slash in a name makes it no part of another application."""
    own, stranger = (Ingress("i1", lambda: now[0], name) for name in ("llm", "llm/b"))
    await rounds([own, stranger], now, 3)
    assert own.answered(20) == stranger.answered(20) == 10


async def test_key_exchange_after_an_outage_nobody_is_gone(two, now, kv_store):
    """Whoever asks first finds what the others said before it, which counts still."""
    await rounds(two, now, 2)
    assert two[1].answered(5) == 5
    await rounds([*two, two[0]], now)
    kv_store.is_lost = True
    await rounds(two, now, int(LOST_S) + 2)
    kv_store.is_lost = False
    await two[0].exchange.round()
    assert two[0].answered(20) == 3  # of five that are left
