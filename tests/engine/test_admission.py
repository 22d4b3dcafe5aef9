"""Admission: what may wait, and that one client's burst leaves room for others."""

from types import SimpleNamespace

import pytest

from serve_app.engine.admission import Admission, Limits
from serve_app.errors import Overloaded
from serve_app.protocol import Priority

LIMITS = Limits(running=8, queued=32, queued_tokens=10_000)


class Loop:
    """What an engine has to do: all but eight requests wait, in a cache of no size."""

    def __init__(self):
        self.open = 0

    @property
    def waiting(self):
        return max(0, self.open - LIMITS.running)

    def stats(self):
        return SimpleNamespace(running_tokens=0, kv_tokens_total=0)

    def drain_rate(self):
        return None


class Queue:
    """Requests that come and stay."""

    def __init__(self):
        self._loop = Loop()
        self._admission = Admission(self._loop, LIMITS)

    def admitted(self, client, times, tokens=1, priority=Priority.NORMAL):
        """Return how many of a client's next requests are taken on."""
        return sum(self._take(client, tokens, priority) for _ in range(times))

    def end(self, keys):
        for key in keys:
            self._admission.drop(key)
            self._loop.open -= 1

    def _take(self, client, tokens, priority):
        try:
            self._admission.require(1, tokens, client, priority)
        except Overloaded:
            return False
        self._admission.add(self._loop.open, tokens, client, priority)
        self._loop.open += 1
        return True


def test_admission_one_client_has_the_whole_line():
    """As before there were others; and not one request more."""
    assert Queue().admitted("a", 99) == LIMITS.open


@pytest.mark.parametrize("tokens", [1, 400])
def test_admission_a_full_line_has_room_for_others(tokens):
    """Each gets less than the one before, and the burst nothing of it; tokens count alike."""
    queue = Queue()
    full = queue.admitted("a", 99, tokens)
    assert full == (LIMITS.open if tokens == 1 else 10_000 // tokens)
    others = [queue.admitted(client, 99, tokens) for client in "bcde"]
    assert others[0] >= 4
    assert all(others)
    assert sum(others) <= LIMITS.open + LIMITS.spare - full
    assert queue.admitted("a", 9, tokens) == 0


def test_admission_many_of_the_lowest_class_leave_room_for_others():
    """A hundred names of one request each fill the line, and a higher class goes before them."""
    queue = Queue()
    low = [queue.admitted(f"low-{number}", 1, priority=Priority.LOW) for number in range(100)]
    assert sum(low) == LIMITS.open
    high = queue.admitted("high", LIMITS.spare // 2, priority=Priority.HIGH)
    assert high == LIMITS.spare // 2
    assert high + queue.admitted("normal", 99) == LIMITS.spare
    assert queue.admitted("low", 9, priority=Priority.LOW) == 0


def test_admission_many_of_a_class_leave_room_for_the_highest():
    """A flood and a hundred names of class normal fill the spare room, and high has some more."""
    queue = Queue()
    queue.admitted("flood", 99)
    normal = [queue.admitted(f"normal-{number}", 9) for number in range(100)]
    assert sum(normal) == LIMITS.spare
    high = [queue.admitted(f"high-{number}", 1, priority=Priority.HIGH) for number in range(100)]
    assert sum(high) == LIMITS.most - LIMITS.open - LIMITS.spare > 0
    assert queue.admitted("another", 9) == 0


def test_admission_room_comes_back():
    """When what took it has ended, for whoever comes."""
    queue = Queue()
    queue.admitted("a", 99)
    assert queue.admitted("b", 99) == 5
    queue.end(range(LIMITS.open, LIMITS.open + 5))
    assert queue.admitted("a", 1) == 0
    assert queue.admitted("b", 99) == 5
