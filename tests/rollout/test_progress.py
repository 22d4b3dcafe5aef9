"""What a person reads while replicas start."""

from serve_app.rollout.progress import Progress
from serve_app.telemetry.cold_start import Phase


def course(*reported):
    """Show phases to a Progress, each (seconds, name, bytes, total); returns the lines."""
    now = [0.0]
    progress = Progress(lambda: now[0])
    lines = []
    for seconds, name, done, total in reported:
        now[0] = seconds
        lines += progress.lines({"abc": Phase(name, 1e9 + seconds, done, total)})
    return lines


def test_progress_reports_each_phase_once():
    """However often it is asked."""
    reported = [(0.0, "check", None, None), (0.5, "check", None, None), (9.0, "check", None, None)]
    assert course(*reported, (9.5, "load", None, None)) == ["abc: check", "abc: load"]


def test_progress_of_a_download_has_bytes_rate_and_what_is_left():
    """Every five seconds, by the bytes since the line before."""
    total = 16_100_000_000
    lines = course(
        (0.0, "download", None, None),
        (2.0, "download", 100_000_000, total),
        (5.0, "download", 600_000_000, total),
        (6.0, "download", 700_000_000, total),
        (10.0, "download", 1_100_000_000, total),
        (15.0, "download", 16_000_000_000, total),
    )
    assert lines == [
        "abc: download",
        "abc: download 0.6 of 16.1 GB",
        "abc: download 1.1 of 16.1 GB, 100.0 MB/s, 2 min left",
        "abc: download 16.0 of 16.1 GB, 2980.0 MB/s, 0 s left",
    ]


def test_progress_reports_a_download_that_stands_still_and_none_that_waits():
    """Nothing comes: that is worth a line. Somebody else fetches, or all is here: it is not."""
    half, whole = ("download", 5_000_000, 10_000_000), ("download", 10_000_000, 10_000_000)
    assert course((0.0, *half), (5.0, *half), (10.0, *half)) == [
        "abc: download",
        "abc: download 5.0 of 10.0 MB, 0.0 MB/s",
        "abc: download 5.0 of 10.0 MB, 0.0 MB/s",
    ]
    waits = ("download", None, None)
    assert course((0.0, *waits), (5.0, *waits), (9.0, *waits)) == ["abc: download"]
    assert course((0.0, *whole), (5.0, *whole), (10.0, *whole)) == ["abc: download"]


def test_progress_distinguishes_replicas():
    """Each has its own line."""
    lines = Progress().lines({"b": Phase("load", 1.0), "a": Phase("check", 1.0)})
    assert lines == ["a: check", "b: load"]
