"""Work beside the requests: what ends it and what does not."""

import asyncio

import pytest
from ray.exceptions import RayError
from structlog.testing import capture_logs

from serve_app.deployments import jobs
from serve_app.deployments.jobs import keep_running


async def test_keep_running_begins_again_after_an_error(monkeypatch):
    """Whatever it was; the log says where, and not what it said."""
    monkeypatch.setattr(jobs, "PAUSE_S", 0.001)
    faults = [RayError("a secret"), ValueError("a secret"), KeyError("a secret")]

    async def work():
        if faults:
            raise faults.pop()

    with capture_logs() as logs:
        await asyncio.wait_for(keep_running(work, "canary"), 2)
    assert [(line["event"], line["job"]) for line in logs] == [("job.failed", "canary")] * 3
    assert [line["cause"] for line in logs] == ["KeyError", "ValueError", "RayError"]
    assert "test_jobs.py" in logs[0]["where"]
    assert "secret" not in str(logs)


async def test_keep_running_ends_when_cancelled():
    """As when its replica ends."""
    task = asyncio.create_task(keep_running(lambda: asyncio.sleep(60), "canary"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
