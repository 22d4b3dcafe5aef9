"""One service for all clients, on a socket of this machine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.api.harness import Service, listening
from tests.clients.canned import engine


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The base URL of a service that runs beside the tests, in a thread."""
    started, stop = threading.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        service = Service(engine(), aliases=("tiny",), max_context_tokens=8192)
        async with listening(service.app) as address:
            found.append(f"{address}/v1")
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(20)
    yield found[0]
    stop.set()
    thread.join(20)
