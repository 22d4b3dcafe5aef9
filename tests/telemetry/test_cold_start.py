"""The ledger of a start: which phases it has, what they add up to, what it says to whom."""

import time

import pytest

from serve_app.cli import coldstart
from serve_app.telemetry import cold_start
from serve_app.telemetry.cold_start import Ledger, Span, Start


@pytest.fixture
def asked(monkeypatch, kv_store):
    """Serve's answer to when it decided, None if it does not answer; the cluster's memory."""
    answer = {"at": None, "kept": kv_store.held}
    monkeypatch.setattr(cold_start, "_scheduled_at", lambda application, replica: answer["at"])
    return answer


def phases(start):
    return {span.phase: span for span in start.spans}


def close(book):
    return book.close("node-a", {}, ready_at=cold_start.now())


def start_of(*spans, ready_s=10.0):
    return Start("llm", "abc", "node-a", spans, ready_s, {"hub": 5, "peer": 0, "cache": 7})


def test_ledger_begins_with_the_process(asked):
    """Without Serve's word the first phase is the interpreter's, as the system says."""
    book = Ledger("llm", "abc")
    with book.span("check"):
        time.sleep(0.05)
    start = close(book)
    assert [span.phase for span in start.spans] == ["interpreter", "imports", "check"]
    assert 0 < phases(start)["interpreter"].duration_s < time.time() - start.started_at
    assert 0.05 <= phases(start)["check"].duration_s < 1
    assert start.ready_s == pytest.approx(time.time() - start.started_at, abs=0.5)


def test_ledger_has_the_schedule_until_the_process_is_there(asked):
    """From Serve's decision to the first phase, without a gap."""
    book = Ledger("llm", "abc")
    asked["at"] = cold_start._process_started_at() - 2.0
    start = close(book)
    first, second = start.spans[:2]
    assert (first.phase, second.phase) == ("schedule", "interpreter")
    assert first.duration_s == pytest.approx(2.0, abs=0.1)
    assert first.started_at + first.duration_s == pytest.approx(second.started_at)


def test_ledger_has_no_interpreter_for_a_worker_that_was_there_before(asked):
    """Ray keeps some at hand; their start belongs to nobody."""
    book = Ledger("llm", "abc")
    asked["at"] = cold_start.IMPORTED_AT - 0.001
    start = close(book)
    assert [span.phase for span in start.spans] == ["schedule", "imports"]


def test_ledger_survives_a_clock_that_runs_ahead(asked):
    """The controller's node may live in our future; then nothing is said of the schedule."""
    asked["at"] = time.time() + 60
    start = close(Ledger("llm", "abc"))
    assert "schedule" not in phases(start)
    assert start.ready_s > 0


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_ledger_moves_no_phase_when_a_clock_is_set_meanwhile(asked, monkeypatch, jump_s):
    """All phases are from one clock that only goes on, and the start lasts as long as it did."""
    book = Ledger("llm", "abc")
    with book.span("check"):
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + jump_s)
        book.publish("check", 1, 2)
        time.sleep(0.05)
    with book.span("load"):
        pass
    reported = cold_start.running("llm", since=0)["abc"]
    start = close(book)
    assert 0.05 <= phases(start)["check"].duration_s < 5
    ordered = [span.started_at for span in start.spans]
    assert ordered == sorted(ordered)
    assert 0.05 < start.ready_s < 3600  # the age of the test process at the most
    assert ordered[-1] - reported.published_at < 5


def test_ledger_places_phases_that_were_timed_elsewhere_one_after_another(asked):
    """The engine reports seconds, the ledger places them."""
    book = Ledger("llm", "abc")
    book.follow({"weights": 2.0, "warm_up": 1.0}, started_at=100.0)
    start = close(book)
    assert phases(start)["weights"] == Span("weights", 100.0, 2.0)
    assert phases(start)["warm_up"] == Span("warm_up", 102.0, 1.0)


def test_ledger_shows_the_cluster_the_phase_that_runs(asked):
    """Until the replica is ready; what an earlier one left behind does not count."""
    book = Ledger("llm", "abc")
    before = cold_start.now()  # the wall clock may be set meanwhile
    with book.span("check"):
        assert cold_start.running("llm", since=before)["abc"].name == "check"
    book.publish("download", 3, 10)
    phase = cold_start.running("llm", since=before)["abc"]
    assert (phase.name, phase.done_bytes, phase.total_bytes) == ("download", 3, 10)
    assert cold_start.running("llm", since=cold_start.now() + 1) == {}
    close(book)
    assert asked["kept"] == {}


def test_ledger_of_an_application_whose_name_begins_like_anothers(asked):
    """Serve takes any name, also one with a slash: the one's replicas are not the other's."""
    Ledger("llm", "abc").publish("check")
    Ledger("llm/eu", "def").publish("check")
    assert list(cold_start.running("llm", since=0)) == ["abc"]
    assert list(cold_start.running("llm/eu", since=0)) == ["def"]


def test_ledger_has_a_phase_that_fails(asked):
    """Its seconds were spent."""
    book = Ledger("llm", "abc")
    with pytest.raises(ValueError, match="no"), book.span("check"):
        raise ValueError("no")
    assert "check" in phases(close(book))


def test_facts_have_every_phase_with_its_unit():
    """One flat line."""
    start = start_of(Span("check", 1.0, 0.25), Span("download", 1.25, 4.0))
    assert start.facts() == {"ready_s": 10.0, "check_s": 0.25, "download_s": 4.0}


def test_with_first_token_counts_after_the_start_however_late_it_came():
    """It came with the first request, which may be tomorrow's."""
    start = cold_start.with_first_token(
        start_of(Span("check", 100.0, 10.0)), asked_at=86_500.0, ttft_s=0.1
    )
    assert start.ready_s == 10.0
    assert coldstart.facts(start)["spans"][-1] == {
        "phase": "first_token",
        "at_s": 86_400.0,
        "duration_s": 0.1,
    }


def test_keep_remembers_the_latest_starts_only(monkeypatch, kv_store):
    """Each start once, oldest first; a start that answered replaces itself."""
    monkeypatch.setattr(cold_start, "KEPT", 3)
    for second in range(5):
        start = start_of(Span("check", 1000.0 + second, 1.0))
        cold_start.keep(start)
    cold_start.keep(cold_start.with_first_token(start, asked_at=2000.0, ttft_s=0.1))
    found = cold_start.recent()
    assert [kept.started_at for kept in found] == [1002.0, 1003.0, 1004.0]
    assert [span.phase for span in found[-1].spans] == ["check", "first_token"]
    assert found[0] == start_of(Span("check", 1002.0, 1.0))


def test_keep_fails_no_start_when_the_store_does_not_answer(kv_store):
    """The ledger is for people; the replica serves without."""
    kv_store.is_lost = True
    cold_start.keep(start_of(Span("check", 100.0, 1.0)))


def test_keep_forgets_after_a_day_a_replica_killed_while_it_started(asked, monkeypatch):
    """By the next start that is kept; one that still starts is not."""
    for name, ago_s in (("lost", cold_start.LOST_S + 1), ("slow", cold_start.LOST_S - 60)):
        with monkeypatch.context() as patch:
            now = time.time() - ago_s
            patch.setattr(cold_start, "now", lambda now=now: now)
            Ledger("llm", name).publish("download")
    cold_start.keep(start_of(Span("check", 1.0, 1.0)))
    assert list(cold_start.running("llm", since=0)) == ["slow"]
