"""The table of what was kept."""

from types import SimpleNamespace

from tests.chaos import report
from tests.chaos.faults import FAULTS
from tests.chaos.load import Answer


def stage(*answers, struck_at, recovered_at=None):
    """Return what a stage holds after its fault."""
    return SimpleNamespace(
        load=SimpleNamespace(answers=list(answers)),
        struck_at=struck_at,
        recovered_at=recovered_at,
        streams_lost=1,
    )


def test_row_counts_kinds_and_times_from_the_fault(tmp_path, monkeypatch):
    """Good streams that began before the fault do not show that it is over."""
    monkeypatch.setattr(report, "PLACE", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    ended = stage(
        Answer(9.0, 12.0, "ok"),
        Answer(9.5, 10.1, "error event", "engine_dead"),
        Answer(10.5, 11.0, "http 503", "not_ready"),
        Answer(11.0, 13.5, "ok"),
        struck_at=10.0,
        recovered_at=24.0,
    )
    row = report.summarise(ended, "replica killed", "It\n    dies.", "of two")
    assert row["failed"] == {"error event engine_dead": 1, "http 503 not_ready": 1}
    assert (row["answers_again_s"], row["whole_again_s"]) == (3.5, 14.0)
    report.keep("replica killed", row)
    report.write(["node killed", "replica killed"])
    text = (tmp_path / "results.md").read_text()
    assert (
        "| replica killed | It dies. | 4 | 1 × error event engine_dead, 1 × http 503 not_ready "
        "| 1 | 3.5 | 14.0 | of two |"
    ) in text
    assert "Not measured yet: node killed." in text


def test_row_reports_what_never_recovers():
    """No good answer after the fault is not a time."""
    row = report.summarise(stage(Answer(1.0, 2.0, "cut"), struck_at=1.5), "x", "", "")
    assert row["answers_again_s"] is row["whole_again_s"] is None
    assert row["before_fault_failed"] == 0


def test_render_results():
    """The table in the repository is the one that the kept results give."""
    assert (report.PLACE / "results.md").read_text() == report.render(FAULTS)
