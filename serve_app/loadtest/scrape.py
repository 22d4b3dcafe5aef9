"""The server's own view over time, from a Prometheus page where one is reachable.

Names are matched by suffix, because vLLM's (`vllm:`) and ours through Ray (`ray_serve_app_`)
differ in the prefix alone.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import urllib.request
from http.client import HTTPException
from types import TracebackType

from serve_app.loadtest.summary import Json

INTERVAL_S = 1.0
GAUGES = {
    "running": "num_requests_running",
    "waiting": "num_requests_waiting",
    "kv_cache_usage": "kv_cache_usage_perc",
    "generation_tokens": "generation_tokens_total",
    "replicas": "serve_deployment_replica_healthy",
}
_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(\{.*\})?\s+([^\s]+)", re.MULTILINE)


class Scraper:
    """Asks a page every second in a thread of its own; a context manager.

    Args:
        url: of the page.
        headers: sent along, for a page behind the API key.
    """

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        self._request = urllib.request.Request(url, headers=headers)  # noqa: S310 - user's URL
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._points: list[tuple[float, dict[str, float]]] = []

    def timeline(self, start: float) -> Json | None:
        """Return what was seen, a list for each quantity; None if the page never answered.

        Args:
            start: zero of the times, on the monotonic clock.
        """
        points = list(self._points)
        if not points:
            return None
        columns: Json = {"at_s": [round(at - start, 3) for at, _ in points]}
        return columns | {name: [seen.get(name) for _, seen in points] for name in GAUGES}

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            with (
                contextlib.suppress(OSError, HTTPException, ValueError),
                urllib.request.urlopen(self._request, timeout=2) as page,  # noqa: S310
            ):
                seen = read(page.read().decode())
                if seen:
                    self._points.append((time.monotonic(), seen))


def read(text: str) -> dict[str, float]:
    """Sum each quantity over the replicas of a Prometheus page.

    Serve counts the ingress' replicas too; those of the LLM server are the ones meant.
    """
    sums: dict[str, float] = {}
    series = 0
    for name, labels, value in _LINE.findall(text):
        for quantity, suffix in GAUGES.items():
            if not name.endswith(suffix):
                continue
            if quantity == "replicas" and 'deployment="LLMServer"' not in labels:
                continue
            sums[quantity] = sums.get(quantity, 0.0) + float(value)
            series += quantity == "running"
    if "kv_cache_usage" in sums and series:
        sums["kv_cache_usage"] /= series  # a share, so the mean of the replicas
    return sums
