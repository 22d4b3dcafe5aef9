"""Ports of this machine for servers that cannot choose one themselves."""

import os
import random
import socket
from collections.abc import Iterator

# Above the ports of Ray's workers (10002 to 19999), below those the kernel gives to whoever asks
# for any (32768 and up): there another program could get one before the server under test binds.
FIRST, PAST_LAST = 20_000, 32_000
WORKERS = 8  # pytest-xdist's processes have a share each


def _numbers() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
    share = (PAST_LAST - FIRST) // WORKERS
    start = random.randrange(share)  # two runs at once rarely meet
    while True:
        yield FIRST + worker * share + start % share
        start += 1


_next_number = _numbers()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on, and that was not returned lately."""
    for port in _next_number:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError("the numbers do not end")
