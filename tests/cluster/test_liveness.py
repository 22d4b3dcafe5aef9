"""Who still writes: by values alone, on this process's own clock."""

from serve_app.cluster.liveness import Liveness


def test_liveness_follows_values():
    """One that changes is alive; one that stays the same has ended after the time, not before."""
    now = [100.0]
    liveness = Liveness(5.0, lambda: now[0])
    assert liveness.alive({"a": b"1", "b": b"1"}) == {"a", "b"}
    now[0] += 5
    assert liveness.alive({"a": b"2", "b": b"1"}) == {"a", "b"}
    now[0] += 1
    assert liveness.alive({"a": b"2", "b": b"1"}) == {"a"}


def test_liveness_forgets_who_is_gone():
    """A key that comes again begins anew, and so does everybody after an outage."""
    now = [0.0]
    liveness = Liveness(5.0, lambda: now[0])
    liveness.alive({"a": b"1"})
    now[0] += 6
    assert liveness.alive({"a": b"1"}) == set()
    assert liveness.alive({}) == set()
    assert liveness.alive({"a": b"1"}) == {"a"}
    now[0] += 6
    liveness.forget()
    assert liveness.alive({"a": b"1"}) == {"a"}
