"""What the command and the ingresses say to each other about a canary."""

import pytest

from serve_app.cluster.liveness import Liveness
from serve_app.deployments import canary as store
from serve_app.deployments.canary import Canary, Seen, Sketch


def test_read_returns_what_was_written(kv_store):
    """Of this application alone, whatever its name is."""
    canary = Canary(
        "a/b-canary", "t", 3, 0.25, 0.5, "client", 10.0, 5.0, ("legal",), {"": "c1", "legal": None}
    )
    store.write("a/b", canary)
    assert store.read("a/b") == canary
    assert store.read("a") is None
    assert store.under_way() == ["a/b"]


def test_read_leaves_out_what_a_newer_version_knows(kv_store):
    """What only that one knows is left out."""
    kv_store.held["canary/share/a"] = b'{"application": "x", "trial": "t", "adapters": [], "n": 1}'
    assert store.read("a") == Canary("x", "t")


def test_sketch_counts_and_quantiles():
    """Within 2.5 %, whatever the size; what was merged counts for both."""
    sketch = Sketch()
    assert (sketch.quantile(0.5), sketch.over(0.0)) == (None, 0)
    for number in range(1, 1001):
        sketch.add(number / 100)
    assert sketch.count == 1000
    for share in (0.5, 0.95, 0.99):
        assert sketch.quantile(share) == pytest.approx(10 * share, rel=0.026)
    assert sketch.over(5.0) == pytest.approx(500, abs=15)
    sketch.add(0.0)
    assert sketch.quantile(0.0001) < 0.001


def seen(first, failed=0):
    found = Seen(failed=failed, unanswered=failed)
    for seconds in first:
        found.first.add(seconds)
    return found


def test_report_adds_up_the_present_step(kv_store):
    """Of all ingresses; one that has not come to the step yet counts for nothing."""
    canary = Canary("llm-canary", "t", step=2)
    for ingress, step, ready in (("one", 2, True), ("two", 2, False), ("late", 1, True)):
        known = Canary("llm-canary", "t", step=step)
        store.publish("llm", ingress, known, ready=ready, stable=seen([1, 2]), tried=seen([3], 1))
    report = store.report("llm", canary)
    assert (report.ingresses, report.unready) == (2, 1)
    assert (report.stable.requests, report.canary.requests, report.canary.failed) == (4, 4, 2)
    assert report.canary.first.quantile(0.5) == pytest.approx(3, rel=0.026)
    store.write("llm", canary)
    store.forget("llm")
    assert kv_store.held == {}


def test_report_of_an_ingress_that_has_ended(kv_store):
    """What it saw counts, and not whether the canary answered it."""
    now, canary = [0.0], Canary("llm-canary", "t", step=1)
    liveness = Liveness(store.SILENT_S, lambda: now[0])

    def say(ingress, *, ready):
        store.publish("llm", ingress, canary, ready=ready, stable=seen([1]), tried=seen([1]))

    def told():
        report = store.report("llm", canary, liveness)
        return report.ingresses, report.unready, report.canary.requests

    say("ended", ready=True)
    say("stays", ready=False)
    assert told() == (2, 1, 2)
    for _ in range(3):
        now[0] += store.SILENT_S / 2
        say("stays", ready=False)
        seen_last = told()
    assert seen_last == (1, 1, 2)
    liveness.forget()
    assert told() == (2, 1, 2)
