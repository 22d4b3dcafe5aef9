"""What a rollout can go back to."""

import pytest

from serve_app.rollout import history


@pytest.fixture(autouse=True)
def store(monkeypatch):
    """Keep the cluster's memory in a dictionary."""
    kept = {}
    kv = history.internal_kv
    monkeypatch.setattr(kv, "_internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr(
        kv, "_internal_kv_put", lambda key, value, namespace: kept.update({key: value})
    )


def goals():
    return [entry.goal["n"] for entry in history.read()]


def test_the_newest_that_does_not_serve_is_the_former():
    """Whether the newest one serves, or something that nobody remembers."""
    assert history.former(None) is None
    for n in (1, 2):
        history.remember({"n": n})
    assert history.former({"n": 2}).goal == {"n": 1}
    assert history.former({"n": 9}).goal == {"n": 2}


def test_the_same_again_is_no_new_entry():
    """A second deploy of the same file must not make it its own former."""
    history.remember({"n": 1})
    history.remember({"n": 1})
    assert goals() == [1]


def test_going_back_twice_goes_further_back():
    """Never to and fro between two."""
    for n in (1, 2, 3):
        history.remember({"n": n})
    old = history.former({"n": 3})
    history.remember({"n": 2, "nudged": True})
    history.replace(old)
    assert goals() == [1, 2]
    assert history.former(history.read()[-1].goal).goal == {"n": 1}


def test_only_the_latest_are_kept():
    """The cluster's memory is not a log."""
    for n in range(30):
        history.remember({"n": n})
    assert goals() == list(range(20, 30))
