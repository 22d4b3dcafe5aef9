"""Threads that clients share: whoever runs least is next, and nobody has all of them."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Job = Callable[[], None]


class FairExecutor:
    """Runs jobs in threads; the client that runs least is next, its oldest job first.

    Args:
        threads: jobs that run at a time.
        threads_per_client: of these, what one client may have.
        name: of the threads.
    """

    def __init__(self, threads: int, *, threads_per_client: int, name: str) -> None:
        self._threads_per_client = threads_per_client
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._lock = threading.Lock()  # of what follows
        self._queued: dict[str, deque[Job]] = {}  # by client, the one that came first first
        self._running: Counter[str] = Counter()

    def submit(self, client: str, job: Job) -> None:
        """Queue a job, which must not raise.

        Raises:
            RuntimeError: this was shut down.
        """
        with self._lock:
            self._queued.setdefault(client, deque()).append(job)
        self._executor.submit(self._run)

    def shutdown(self) -> None:
        """Begin no more jobs; those that run go on."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._queued.clear()

    def _run(self) -> None:
        # A job that waits for its client's share is taken by the thread that ends one of them.
        while (taken := self._take()) is not None:
            client, job = taken
            try:
                job()
            finally:
                with self._lock:
                    self._running[client] -= 1
                    if not self._running[client]:
                        del self._running[client]

    def _take(self) -> tuple[str, Job] | None:
        with self._lock:
            eligible = [c for c in self._queued if self._running[c] < self._threads_per_client]
            if not eligible:
                return None
            client = min(eligible, key=lambda one: self._running[one])
            job = self._queued[client].popleft()
            if not self._queued[client]:
                del self._queued[client]
            self._running[client] += 1
            return client, job
