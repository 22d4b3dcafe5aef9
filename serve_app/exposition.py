"""One page of the whole service's metrics: what Ray exports on each node, put together.

Ray offers Prometheus one page a node, whose ports and addresses change with the cluster. The
ingress asks all of them, so that one scrape target, or one `curl`, shows every replica.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable, Mapping
from typing import Any

import aiohttp
import ray

TIMEOUT_S = 3.0  # of all nodes, asked at once; Prometheus itself gives up after 10 s
_PREFIX = "ray_serve_"  # ours are ray_serve_app_*, all others are Serve's
_HEADER = re.compile(r"# (?:HELP|TYPE) (\S+)")
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})?( \S+.*)")


async def exposition() -> str:
    """Return the metrics of this package and of Serve, of every node that is alive.

    A node that does not answer in time is left out and counted: `serve_app_node_scraped` is 0.
    """
    nodes = [node for node in await asyncio.to_thread(ray.nodes) if node["Alive"]]
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        pages = await asyncio.gather(*(_page(session, node) for node in nodes))
    return merge({node["NodeID"]: page for node, page in zip(nodes, pages, strict=True)})


async def _page(session: aiohttp.ClientSession, node: Mapping[str, Any]) -> str | None:
    host = node["NodeManagerAddress"]
    host = f"[{host}]" if ":" in host else host
    try:
        async with session.get(f"http://{host}:{node['MetricsExportPort']}/metrics") as answer:
            answer.raise_for_status()
            return await answer.text()
    except (aiohttp.ClientError, TimeoutError):
        return None


def merge(pages: Mapping[str, str | None]) -> str:
    """Put pages together: each metric's header once, and all of its samples below it.

    Args:
        pages: text by node id, None where a node did not answer. A sample gets the label
            `node_id` where Serve has not given it one.
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
            elif family.startswith(_PREFIX) and line:
                samples.setdefault(family, {})[_of_node(line, node_id)] = None
    lines = [
        line for family, found in samples.items() for line in (*headers.get(family, ()), *found)
    ]
    return "\n".join([*lines, *_scraped(pages)]) + "\n"


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
