"""Work that may hang for ever, name resolution or a mount, and has to end all the same."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def within(limit_s: float, work: Callable[[], Result]) -> Result | None:
    """Do something in a thread, which is left behind if it overruns.

    Args:
        limit_s: seconds.
        work: what it raises is raised here.

    Returns:
        What it returned; None if it did not end in time.
    """
    results: list[Result] = []
    faults: list[Exception] = []

    def run() -> None:
        try:
            results.append(work())
        except Exception as fault:  # noqa: BLE001 (raised again, in the thread that waits)
            faults.append(fault)

    thread = threading.Thread(target=run, name="access-probe", daemon=True)
    thread.start()
    thread.join(limit_s)
    if faults:
        raise faults[0]
    return results[0] if results else None
