"""The watch: the last verdict is shown, a lost grant is reported, serving is not touched."""

import asyncio
from contextlib import suppress
from dataclasses import replace

import structlog

from serve_app.access.recheck import Watch
from serve_app.access.verdict import NodeVerdict, Outcome, TokenReport, Verdict

COMMIT = "a" * 40


def verdict(*outcomes):
    nodes = tuple(
        NodeVerdict(f"id{i}", f"node-{i}", outcome, "fix", commit=COMMIT)
        for i, outcome in enumerate(outcomes)
    )
    return Verdict("acme/tiny", "main", COMMIT, "https://hub", 0.1, nodes)


async def rounds(answers, until):
    """Run a watch over scripted answers until a condition holds."""
    seen = []
    script = iter(answers[1:])
    last = answers[-1]
    watch = Watch(lambda: next(script, last), answers[0], interval_s=0.01, on_verdict=seen.append)
    task = asyncio.create_task(watch.run())
    async with asyncio.timeout(5):
        while not until(watch):
            await asyncio.sleep(0.005)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return watch, seen


async def test_recheck_of_a_deferred_place_without_nodes_is_no_alarm():
    """Scaled to zero: said once, and not as an error."""
    nowhere = replace(verdict(Outcome.PROBE_FAILED).nodes[0], node_id="", deferred=True)
    gone = replace(verdict(Outcome.GRANTED), nodes=(nowhere,))
    with structlog.testing.capture_logs() as logs:
        await rounds(
            [verdict(Outcome.GRANTED), gone],
            lambda watch: not watch.snapshot()["nodes"][0]["node_id"],
        )
    assert {entry["event"] for entry in logs} == {"access.deferred"}
    assert {entry["log_level"] for entry in logs} == {"info"}


async def test_watch_shows_the_first_verdict_at_once():
    """Nobody waits an interval to see the matrix; the gauge gets it too."""
    seen = []
    watch = Watch(lambda: None, verdict(Outcome.GRANTED), interval_s=900, on_verdict=seen.append)
    assert watch.snapshot()["approved"] is True
    assert watch.snapshot()["checked_at"] > 1e9
    assert len(seen) == 1


async def test_watch_shows_and_logs_a_lost_grant_once():
    """The node turns red in the snapshot; one error line, not one for each round."""
    lost = verdict(Outcome.GRANTED, Outcome.LICENSE_NOT_ACCEPTED)
    with structlog.testing.capture_logs() as logs:
        watch, seen = await rounds(
            [verdict(Outcome.GRANTED, Outcome.GRANTED), lost, lost, lost],
            lambda w: not w.snapshot()["approved"],
        )
    assert [n["outcome"] for n in watch.snapshot()["nodes"]] == ["granted", "license_not_accepted"]
    assert seen[-1] == lost
    refused = [line for line in logs if line["event"] == "access.refused"]
    assert len(refused) == 1
    assert refused[0]["log_level"] == "error"
    assert refused[0]["node_id"] == "id1"


async def test_watch_logs_a_grant_that_comes_back():
    """The end of a problem is news as well."""
    with structlog.testing.capture_logs() as logs:
        await rounds(
            [verdict(Outcome.REQUEST_PENDING), verdict(Outcome.GRANTED)],
            lambda w: w.snapshot()["approved"],
        )
    assert [line["event"] for line in logs] == ["access.granted"]


async def test_watch_logs_a_new_warning_once():
    """Such as that receipts cannot be kept while the disk is full; grants are not touched."""
    fine = verdict(Outcome.GRANTED, Outcome.GRANTED)
    token = TokenReport("env:HF_TOKEN", warnings=("no receipt can be kept",))
    full = replace(fine, nodes=(fine.nodes[0], replace(fine.nodes[1], token=token)))
    with structlog.testing.capture_logs() as logs:
        await rounds([fine, full, full, full, fine, full, fine], rounds_of(7))
    assert [(line["event"], line["node_id"], line["detail"]) for line in logs] == [
        ("access.conflict", "id1", "no receipt can be kept")
    ] * 2


def rounds_of(count):
    """Return a condition that holds when a watch has looked so often."""
    dates = set()
    return lambda watch: dates.add(watch.snapshot()["checked_at"]) or len(dates) >= count
