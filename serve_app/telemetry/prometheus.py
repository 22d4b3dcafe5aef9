"""One page of the whole service's metrics: what Ray exports on each node, put together.

Ray offers Prometheus one page a node, whose ports and addresses change with the cluster. The
ingress asks all of them, so that one scrape target, or one `curl`, shows every replica.

A node's own page (Ray 2.60) keeps the counters of every replica that ever ran there. Here those
of a dead one stay for a quarter of an hour, so that no scrape misses its last count, and go.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any

import aiohttp
import ray
from ray.exceptions import RayError

from serve_app.cluster.controller import living_replicas

TIMEOUT_S = 3.0  # of all nodes, asked at once; Prometheus itself gives up after 10 s
KEPT_S = 900.0  # of a dead replica; longer than the windows of configs/prometheus/rules.yaml
_PREFIX = "ray_serve_"  # ours are ray_serve_app_*, all others are Serve's
_HEADER = re.compile(r"# (?:HELP|TYPE) (\S+)")
_REPLICA = re.compile(r'[{,]replica="([^"]+)"')
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})?( \S+.*)")


class Exposition:
    """The page, and since when each dead replica on it is dead.

    Args:
        living: returns the ids of the replicas that live; it may block.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        living: Callable[[], Set[str]] = living_replicas,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._living = living
        self._clock = clock
        self._dead_since: dict[str, float] = {}

    async def page(self) -> str:
        """Return the metrics of this package and of Serve, of every node that is alive.

        A node that does not answer in time is left out and counted: `serve_app_node_scraped` is
        0. While the cluster does not say which replicas live, none is left out.
        """
        nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            pages = await asyncio.gather(*(_page(session, node) for node in nodes))
        by_node = {node["NodeID"]: page for node, page in zip(nodes, pages, strict=True)}
        try:
            forgotten = self._forgotten(by_node.values(), await asyncio.to_thread(self._living))
        except RayError:
            forgotten = set()
        return await asyncio.to_thread(merge, by_node, forgotten)

    def _forgotten(self, pages: Iterable[str | None], living: Set[str]) -> Set[str]:
        """Return the replicas that are dead for long enough, of those on the pages."""
        shown = {replica for page in pages if page for replica in _REPLICA.findall(page)}
        now = self._clock()
        self._dead_since = {
            replica: self._dead_since.get(replica, now) for replica in shown - living
        }
        return {replica for replica, at in self._dead_since.items() if now - at >= KEPT_S}


async def _page(session: aiohttp.ClientSession, node: Mapping[str, Any]) -> str | None:
    host = node["NodeManagerAddress"]
    host = f"[{host}]" if ":" in host else host
    try:
        async with session.get(f"http://{host}:{node['MetricsExportPort']}/metrics") as answer:
            answer.raise_for_status()
            return await answer.text()
    except (aiohttp.ClientError, TimeoutError):
        return None


def merge(pages: Mapping[str, str | None], forgotten: Set[str] = frozenset()) -> str:
    """Put pages together: each metric's header once, and all of its samples below it.

    Args:
        pages: text by node id, None where a node did not answer. A sample gets the label
            `node_id` where Serve has not given it one.
        forgotten: ids of replicas whose samples are left out.
    """
    headers: dict[str, dict[str, None]] = {}  # dicts, as sets that keep their order
    samples: dict[str, dict[str, None]] = {}
    for node_id, page in pages.items():
        family = ""
        for line in (page or "").splitlines():
            if header := _HEADER.match(line):
                family = header[1]
                if family.startswith(_PREFIX) and family not in samples:
                    headers.setdefault(family, {})[line] = None
            elif family.startswith(_PREFIX) and line and not _is_of(line, forgotten):
                samples.setdefault(family, {})[_of_node(line, node_id)] = None
    lines = [
        line for family, found in samples.items() for line in (*headers.get(family, ()), *found)
    ]
    return "\n".join([*lines, *_scraped(pages)]) + "\n"


def _is_of(sample: str, replicas: Set[str]) -> bool:
    found = _REPLICA.search(sample) if replicas else None
    return found is not None and found[1] in replicas


def _of_node(sample: str, node_id: str) -> str:
    parts = _SAMPLE.fullmatch(sample)
    if parts is None or re.search(r'(?:^|,)node_id="', parts[2] or ""):
        return sample
    labels = ",".join(filter(None, [f'node_id="{node_id}"', parts[2]]))
    return f"{parts[1]}{{{labels}}}{parts[3]}"


def _scraped(pages: Mapping[str, str | None]) -> Iterable[str]:
    yield "# HELP serve_app_node_scraped 1 where the node's metrics are on this page, else 0."
    yield "# TYPE serve_app_node_scraped gauge"
    for node_id, page in pages.items():
        yield f'serve_app_node_scraped{{node_id="{node_id}"}} {int(page is not None)}'
