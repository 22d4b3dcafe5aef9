"""Limits of keys: exact on one ingress, within the stated error on several."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.api.key_limits import SPAN_S, KeyLimits
from serve_app.api.keys import Key
from serve_app.errors import KeyLimitExceeded


class Clock:
    """Monotonic seconds that a test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def post(limits, key, tokens=0, used=0):
    """Send a request that ends at once; return None, or the error."""
    try:
        with limits.admitted(key) as allowance:
            try:
                allowance.reserve(tokens)
            finally:
                allowance.settle(used)
    except KeyLimitExceeded as error:
        return error
    return None


def answered(limits, key, times):
    return sum(post(limits, key) is None for _ in range(times))


def test_key_limits_are_exact_whenever_the_minute_begins(clock):
    """Never more than the limit in 60 s, and all of it; the header says when one more fits."""
    limits, key = KeyLimits(clock), Key("a", rpm=5)
    assert answered(limits, key, 2) == 2
    clock.now += 50
    assert answered(limits, key, 9) == 3
    error = post(limits, key)
    assert (error.param, error.details["retry_after_s"]) == ("rpm", 10)
    assert "limit of 5 requests a minute (rpm)" in error.message
    clock.now += 9.9
    assert post(limits, key) is not None
    clock.now += 0.1
    assert answered(limits, key, 9) == 2


@settings(deadline=None)
@given(st.lists(st.integers(0, 80), max_size=120), st.integers(1, 12))
def test_key_limits_no_minute_has_more_than_its_requests(quarters, limit):
    """At any pace; and what comes after the time to wait is let in."""
    clock = Clock()
    limits, key, times = KeyLimits(clock), Key("a", rpm=limit), []
    for quarter in quarters:
        clock.now += quarter / 4
        error = post(limits, key)
        if error is None:
            times.append(clock.now)
        else:
            later = clock.now + error.details["retry_after_s"]
            assert sum(at > later - SPAN_S for at in times) < limit
        assert sum(at > clock.now - SPAN_S for at in times) <= limit


def test_key_limits_streams_come_back_however_a_request_ends(clock):
    """Answered, refused, broken or cancelled."""
    limits, key = KeyLimits(clock), Key("a", streams=2, rpm=50)
    for fault in (None, KeyError, GeneratorExit, KeyboardInterrupt):
        for _ in range(3):
            try:
                with limits.admitted(key), limits.admitted(key):
                    error = post(limits, key)
                    assert error.param == "streams"
                    if fault:
                        raise fault
            except (KeyError, GeneratorExit, KeyboardInterrupt):
                pass
    assert post(limits, key) is None


def test_key_limits_what_is_refused_counts_against_no_other_limit(clock):
    """A full line of streams uses up no requests of the minute."""
    limits, key = KeyLimits(clock), Key("a", streams=1, rpm=3)
    with limits.admitted(key):
        assert answered(limits, key, 10) == 0
    assert answered(limits, key, 10) == 2


def test_key_limits_tokens_are_reserved_and_settled(clock):
    """What a request may come to, while it runs; then, for a minute, what it came to."""
    limits, key = KeyLimits(clock), Key("a", tpm=1000)
    with limits.admitted(key) as running:
        running.reserve(700)
        error = post(limits, key, tokens=400)
        assert error.param == "tpm"
        assert post(limits, key, tokens=300) is None
        clock.now += 100  # a long answer is still reserved
        assert post(limits, key, tokens=301) is not None
        running.settle(650)
    assert post(limits, key, tokens=351).details["retry_after_s"] == 60
    assert post(limits, key, tokens=350, used=0) is None
    clock.now += 60
    assert post(limits, key, tokens=1000) is None


def test_key_limits_a_request_of_more_tokens_than_the_limit_waits_for_all_of_it(clock):
    """It is not refused for ever; what it came to counts in full."""
    limits, key = KeyLimits(clock), Key("a", tpm=1000)
    assert post(limits, key, tokens=10, used=10) is None
    assert post(limits, key, tokens=5000).details["retry_after_s"] == 60
    clock.now += 60
    assert post(limits, key, tokens=5000, used=4000) is None
    clock.now += 59
    assert post(limits, key, tokens=1) is not None


def test_key_limits_a_failed_request_costs_no_tokens(clock):
    """Its reservation comes back whole."""
    limits, key = KeyLimits(clock), Key("a", tpm=100)
    for _ in range(50):
        assert post(limits, key, tokens=100, used=0) is None


def test_key_limits_of_one_name_count_together_and_others_apart(clock):
    """A rotation gives nobody twice the limit."""
    limits = KeyLimits(clock)
    assert answered(limits, Key("a", rpm=4), 3) == 3
    assert answered(limits, Key("a", rpm=4, admin=True), 3) == 1
    assert answered(limits, Key("b", rpm=4), 9) == 4
    assert answered(limits, Key("c"), 999) == 999


def test_key_limits_one_that_is_lowered_counts_at_once(clock):
    """What was used before counts against it; what runs goes on."""
    limits = KeyLimits(clock)
    with limits.admitted(Key("a", rpm=9, streams=2)), limits.admitted(Key("a", rpm=9, streams=2)):
        assert post(limits, Key("a", rpm=9, streams=1)).param == "streams"
    assert post(limits, Key("a", rpm=2)).param == "rpm"
    assert post(limits, Key("a", rpm=3)) is None


def test_key_limits_headers_are_openais(clock):
    """Of the limits that a key has, and of what is left of them."""
    limits, key = KeyLimits(clock), Key("a", rpm=9, tpm=1000)
    assert post(limits, key, tokens=500, used=80) is None
    clock.now += 12.5
    assert limits.headers(key) == {
        "x-ratelimit-limit-requests": "9",
        "x-ratelimit-remaining-requests": "8",
        "x-ratelimit-reset-requests": "48s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "920",
        "x-ratelimit-reset-tokens": "48s",
    }
    assert limits.headers(Key("b", streams=5)) == {}


def meet(ingresses, order):
    """Let ingresses end a round, one after the other, each with what the others said last."""
    for number in order:
        ingresses[number].publish()
        others = [each for each in ingresses if each is not ingresses[number]]
        ingresses[number].learn([dict(each._published) for each in others])


def most(limit, ingresses):
    """Return what several ingresses let in together at the most; see `key_limits.py`."""
    return 1.5 * limit + 2 * (ingresses - 1)


def test_key_limits_two_ingresses_share_what_is_left(clock):
    """A burst that comes to one of them has half at once, and the rest within some rounds."""
    ingresses, key = [KeyLimits(clock) for _ in range(2)], Key("a", rpm=64)
    meet(ingresses, (0, 1))
    meet(ingresses, (0, 1))
    first, second = ingresses
    assert answered(first, key, 100) == 32
    assert post(first, key).details["retry_after_s"] == 1
    total = 32
    for _ in range(6):
        clock.now += 1
        meet(ingresses, (0, 1))
        total += answered(first, key, 100)
    assert total == 64
    meet(ingresses, (0, 1))
    assert answered(second, key, 100) == 0
    assert post(second, key).param == "rpm"


def test_key_limits_a_request_of_more_tokens_than_an_ingress_part(clock):
    """One in a round is let in if all that is left is enough, and no minute is waited for it."""
    ingresses, key = [KeyLimits(clock) for _ in range(2)], Key("a", tpm=1000)
    meet(ingresses, (0, 1))
    assert post(ingresses[0], key, tokens=900, used=100) is None
    refused = post(ingresses[0], key, tokens=850)
    assert refused.details["retry_after_s"] == 1
    clock.now += 1
    meet(ingresses, (0, 1, 0))
    assert post(ingresses[1], key, tokens=900, used=100) is None
    clock.now += 1
    meet(ingresses, (0, 1, 0))
    assert post(ingresses[1], key, tokens=801) is not None
    assert post(ingresses[1], key, tokens=800) is None


@settings(deadline=None, max_examples=200)
@given(st.integers(2, 5), st.integers(1, 5000), st.integers(0, 2**32))
def test_key_limits_tokens_of_several_ingresses_stay_within_the_stated_error(count, limit, seed):
    """However large requests are: half a limit, and two requests for each further ingress."""
    chance, clock = random.Random(seed), Clock()
    ingresses, key = [KeyLimits(clock) for _ in range(count)], Key("a", tpm=limit)
    meet(ingresses, range(count))
    meet(ingresses, range(count))
    largest, running = 1, []
    for _ in range(90):
        clock.now += 1
        for number in chance.sample(range(count), count):
            busy = chance.choice(ingresses)
            for _ in range(chance.choice((0, 1, 5))):
                tokens = chance.choice((1, limit // 2 + 1, limit, chance.randint(1, limit)))
                try:
                    busy.reserve(key, tokens)
                except KeyLimitExceeded:
                    continue
                largest = max(largest, tokens)
                running.append((busy, tokens))
            chance.shuffle(running)
            for _ in range(chance.randint(0, len(running))):
                where, tokens = running.pop()
                where.settle(key, tokens, chance.randint(0, tokens))
            meet(ingresses, (number,))
            counted = sum(each._uses["a"].counts(clock.now).tpm for each in ingresses)
            assert counted <= 1.5 * limit + 2 * (count - 1) * largest


@settings(deadline=None, max_examples=300)
@given(
    st.integers(2, 5),
    st.integers(1, 200),
    st.sampled_from(["rpm", "streams"]),
    st.integers(0, 2**32),
)
def test_key_limits_several_ingresses_stay_within_the_stated_error(count, limit, kind, seed):
    """However bursts and rounds fall: the most that counts at a time is bounded."""
    chance, clock = random.Random(seed), Clock()
    ingresses = [KeyLimits(clock) for _ in range(count)]
    key, open_streams, times = Key("a", **{kind: limit}), [], []
    meet(ingresses, range(count))
    meet(ingresses, range(count))
    for _ in range(90):
        clock.now += 1
        order = chance.sample(range(count), count) if seed % 2 else range(count)
        for number in order:
            busy = chance.choice(ingresses)
            for _ in range(chance.choice((0, 3, limit))):
                admitted = busy.admitted(key)
                try:
                    admitted.__enter__()
                except KeyLimitExceeded:
                    break
                times.append(clock.now)
                open_streams.append(admitted)
                if kind == "rpm" or chance.random() < 0.3:
                    chance.shuffle(open_streams)
                    open_streams.pop().__exit__(None, None, None)
            meet(ingresses, (number,))
        counted = sum(at > clock.now - SPAN_S for at in times)
        assert (counted if kind == "rpm" else len(open_streams)) <= most(limit, count)
