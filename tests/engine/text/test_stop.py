"""Stop strings: found wherever the text is cut, nothing of them shown, nothing else lost."""

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.engine.text.stop import StopMatcher

LETTERS = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def push_all(stop, pieces, **options):
    matcher = StopMatcher(stop, **options)
    shown = "".join(matcher.push(piece) for piece in pieces)
    return (shown, True) if matcher.matched else (shown + matcher.flush(), False)


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_stop_matcher_does_not_depend_on_the_cut(text, stop, cuts):
    """Any pieces give what single characters give."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    assert push_all(stop, pieces) == push_all(stop, list(text))


@given(LETTERS, STOPS)
def test_stop_matcher_ends_at_the_earliest(text, stop):
    """The text ends where the first complete stop string of the shortest prefix begins."""
    shown, matched = push_all(stop, [text])
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    assert matched == bool(ends)
    if ends:
        longest = max(len(s) for s in stop if text[: ends[0]].endswith(s))
        assert shown == text[: ends[0] - longest]
    else:
        assert shown == text


@given(LETTERS, STOPS)
def test_stop_matcher_holds_no_more_than_needed(text, stop):
    """What is held back is a proper prefix of a stop string."""
    matcher = StopMatcher(stop)
    shown = matcher.push(text)
    held = matcher.flush()
    assert matcher.matched or shown + held == text
    assert not held or any(s.startswith(held) and s != held for s in stop)


@pytest.mark.parametrize("after", ["", "more"])
def test_stop_matcher_shows_nothing_after_a_match(after):
    """Text after the stop string belongs to nobody."""
    matcher = StopMatcher(["END"])
    assert matcher.push("one E") == "one "
    assert matcher.push("ND" + after) == ""
    assert matcher.push("two") == ""
    assert matcher.flush() == ""


@given(LETTERS, STOPS, st.lists(st.integers(0, 30), max_size=8))
def test_stop_matcher_can_show_the_stop_string(text, stop, cuts):
    """The text ends with it instead of before it, in any pieces."""
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(edges)]
    shown, matched = push_all(stop, pieces, include=True)
    ends = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    assert (shown, matched) == (text[: ends[0]] if ends else text, bool(ends))


def test_stop_matcher_of_many_long_strings_costs_no_more_than_one():
    """Each character is looked at once: text that nearly matches all of them, all the time."""
    stop = ["a" * 200 + chr(ord("b") + n) for n in range(64)]
    began = time.thread_time()
    matcher = StopMatcher(stop)
    shown = "".join(matcher.push("a") for _ in range(50_000))
    assert time.thread_time() - began < 2
    assert shown + matcher.flush() == "a" * 50_000
