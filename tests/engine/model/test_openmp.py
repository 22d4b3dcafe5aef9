"""Workers of OpenMP belong to the thread that computed."""

import threading
import time
from pathlib import Path

import torch

from serve_app.engine.model.openmp import end_workers


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_end_workers():
    """A thread's workers end while it goes on, and come back when it computes again."""
    numbers = torch.ones(1 << 20)
    seen: list[int] = []

    def compute() -> None:
        torch.set_num_threads(3)
        before = _threads()
        numbers.sum()
        seen.append(_threads() - before)
        end_workers()
        deadline = time.monotonic() + 10
        while _threads() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(_threads() - before)
        assert numbers.sum() == 1 << 20

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    assert seen == [2, 0]
