"""Work beside the requests that goes on for as long as its process, whatever goes wrong once.

A task that nobody awaits ends with its first error and says nothing: grants would not be re-checked
any more, a canary would keep its share for ever, and nobody would know.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import structlog

from serve_app.redaction import place_of

log = structlog.get_logger()

PAUSE_S = 5.0  # before work that failed begins again


Work: TypeAlias = Callable[[], Coroutine[Any, Any, None]]


async def keep_running(work: Work, name: str) -> None:
    """Run work until it ends by itself; after an error, which is logged, begin it again.

    Args:
        work: makes what is awaited.
        name: of it, in the log.
    """
    while True:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 (whatever it is, the work has to go on)
            log.error("job.failed", job=name, cause=type(error).__name__, where=place_of(error))
            await asyncio.sleep(PAUSE_S)
        else:
            return
