"""How long a large model takes to reach many nodes: the swarm's decisions, a modelled network.

    python -m scripts.bench.swarm [--nodes 4,40,400] [--out scripts/bench/results/swarm.md]

Everything that `serve_app/weights/swarm.py` decides is decided by it here too; modelled are the
network, the disks' hashing and the clock. Each node has a line for both directions, of which one
transfer gets an eighth and never more. The Hub shares what it sends equally between its requests.
Nodes report as rarely as in a cluster, and a piece counts when its last byte is there.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from serve_app.weights.holdings import GIVES
from serve_app.weights.pieces import PIECE_BYTES, Failed, File, Got, Order, Report
from serve_app.weights.swarm import Swarm, Unknown
from serve_app.weights.taking import SLOTS, STREAMS


@dataclass(frozen=True, slots=True)
class World:
    """What is modelled; bytes and seconds."""

    files: tuple[File, ...]
    line: float = 25e9 / 8
    hub: float = 1e9
    hash_rate: float = 1e9
    latency_s: float = 0.01
    lost_s: float = 5.0  # until the cluster knows that a node is gone
    refused_s: float = 2.0  # until a node that asks a dead one knows


@dataclass(slots=True)
class Node:
    """One node, and whether it tells the truth."""

    name: str
    joins_at: float
    is_liar: bool = False
    dies_at: float = float("inf")
    content: dict[File, dict[int, str]] = field(default_factory=dict)
    edition: dict[File, int] = field(default_factory=dict)
    busy: int = 0
    requests: int = 0
    moved: int = 0
    taken: int = 0
    given: int = 0
    report: dict[str, list[Any]] = field(default_factory=dict)
    open: set[File] = field(default_factory=set)
    done_at: float | None = None

    def say(self, kind: str, fact: object) -> None:
        """Add a fact to the next report."""
        self.report.setdefault(kind, []).append(fact)


def model(total: int, shards: int, piece_bytes: int) -> tuple[File, ...]:
    """Return the files of a model: equal shards, and a few small ones beside them."""
    small = [File(f"small-{n}", 10_000 * (n + 1), piece_bytes) for n in range(5)]
    large = [File(f"shard-{n:03}", total // shards, piece_bytes) for n in range(shards)]
    return (*large, *small)


class Simulation:
    """A swarm of nodes from its first join to its last whole copy.

    Args:
        world: the network and the model.
        nodes: who takes part, and when.
        seed: of every choice.
        chunked: files come from the Hub whole or not at all, as by the Xet client.
    """

    def __init__(
        self,
        world: World,
        nodes: list[Node],
        *,
        seed: int = 0,
        chunked: bool = False,
        seeds: tuple[str, ...] = (),
    ) -> None:
        self.world, self.nodes = world, {node.name: node for node in nodes}
        self.swarm = Swarm(seed=seed)
        self.chunked = chunked
        self.seeds = seeds
        for name in seeds:
            self.swarm.seed(name)
            self.nodes[name] = Node(name, 0.0, done_at=0.0)
            for file in world.files:
                self.nodes[name].content[file] = {p: _right(file, p) for p in range(file.pieces)}
        self.random = random.Random(seed)  # noqa: S311
        self.now = 0.0
        self.hub_bytes = 0
        self.decisions_s = 0.0
        self.orders = 0
        self._count = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._served = 0.0  # bytes that each request to the Hub got since the beginning
        self._hub: list[tuple[float, int, Callable[[], None]]] = []
        self._left = sum(not node.is_liar and node.dies_at == float("inf") for node in nodes)
        for node in nodes:
            self._at(node.joins_at, partial(self._join, node))
            if node.dies_at < float("inf"):
                self._at(node.dies_at + world.lost_s, partial(self._lose, node))

    def run(self, limit_s: float = 10_000.0) -> None:
        """Go on until every honest node that lives has the model, or the time is over."""
        while self._left and self.now < limit_s:
            hub_at = float("inf")
            if self._hub:
                rest = self._hub[0][0] - self._served
                hub_at = self.now + rest * len(self._hub) / self.world.hub
            if self._events and self._events[0][0] <= hub_at:
                at, _, action = heapq.heappop(self._events)
                self._pass(at)
            elif self._hub:
                self._pass(hub_at)
                _, _, action = heapq.heappop(self._hub)
            else:
                return
            action()

    def _pass(self, at: float) -> None:
        if self._hub:
            self._served += (at - self.now) * self.world.hub / len(self._hub)
        self.now = at

    def _at(self, at: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._count), action))

    def _lose(self, node: Node) -> None:
        self.swarm.lose(node.name)

    def _join(self, node: Node) -> None:
        node.open = set(self.world.files)
        self._enter(node)
        self._exchange(node)

    def _enter(self, node: Node) -> None:
        lacking = [file for file in self.world.files if file in node.open]
        whole = [file for file in self.world.files if file not in node.open]
        entered = self.swarm.join(
            node.name,
            lacking,
            now=self.now,
            whole=whole,
            chunked=lacking if self.chunked else (),
            here={file: node.content.get(file, {}) for file in lacking},
        )
        for file, (edition, right) in entered.items():
            node.edition[file] = edition
            node.content[file] = {p: d for p, d in node.content[file].items() if p in right}

    def _exchange(self, node: Node) -> None:
        if self.now >= node.dies_at or node.done_at is not None:
            return
        report = Report(
            moved=node.moved,
            slots=SLOTS - node.busy,
            streams=STREAMS - node.requests,
            **node.report,
        )
        node.report = {}
        began = time.perf_counter()
        try:
            answer = self.swarm.exchange(node.name, report, now=self.now)
        except Unknown:
            self._enter(node)
            answer = self.swarm.exchange(node.name, report, now=self.now)
        self.decisions_s += time.perf_counter() - began
        self.orders += len(answer.orders)
        for order in answer.orders:
            self._begin(node, order)
        if not node.open:
            node.done_at = self.now
            if not node.is_liar and node.dies_at == float("inf"):
                self._left -= 1
            return
        self._at(self.now + answer.wait_s, lambda: self._exchange(node))

    def _begin(self, node: Node, order: Order) -> None:
        if node.edition.get(order.file) != order.edition:
            node.content[order.file] = {}
            node.edition[order.file] = order.edition
        if order.source is None:
            node.requests += 1
            if self.chunked and order.pieces == order.file.pieces:
                self._request(node, order.file.size, lambda: self._whole_came(node, order))
            else:
                self._next_of_hub(node, order, order.first)
            return
        node.busy += 1
        start, stop = order.file.bounds(order.first)
        source = self.nodes[order.source]
        took = self.world.latency_s + (stop - start) / (self.world.line / GIVES)
        if source.dies_at <= self.now + took:
            took = max(self.world.refused_s, source.dies_at - self.now)
        self._at(self.now + took, lambda: self._came(node, source, order))

    def _request(self, node: Node, size: int, then: Callable[[], None]) -> None:
        def came() -> None:
            self.hub_bytes += size
            node.moved += size
            if self.now < node.dies_at:
                then()

        heapq.heappush(self._hub, (self._served + size, next(self._count), came))

    def _next_of_hub(self, node: Node, order: Order, piece: int) -> None:
        if piece == order.first + order.pieces:
            node.requests -= 1
            return
        start, stop = order.file.bounds(piece)

        def then() -> None:
            content = _right(order.file, piece)
            self._keep(node, order, piece, f"not {content}" if node.is_liar else content)
            self._next_of_hub(node, order, piece + 1)

        self._request(node, stop - start, then)

    def _whole_came(self, node: Node, order: Order) -> None:
        node.requests -= 1
        node.content[order.file] = {p: _right(order.file, p) for p in range(order.file.pieces)}
        self._verify(node, order.file)

    def _came(self, node: Node, source: Node, order: Order) -> None:
        node.busy -= 1
        if self.now >= node.dies_at:
            return
        start, stop = order.file.bounds(order.first)
        content = source.content.get(order.file, {}).get(order.first)
        if content is None and source.is_liar:
            content = "nonsense"
        if self.now >= source.dies_at or content is None:
            node.say("failed", Failed(order))
            return
        if source.is_liar and not content.startswith("not") and self.random.random() < 0.5:
            content = "nonsense"
        node.moved += stop - start
        if content != (order.digest or content):
            node.say("failed", Failed(order, is_wrong=True))
            return
        node.taken += stop - start
        source.given += stop - start
        self._keep(node, order, order.first, content)

    def _keep(self, node: Node, order: Order, piece: int, content: str) -> None:
        file = order.file
        if node.edition.get(file) != order.edition:
            return
        node.content[file][piece] = content
        node.say("got", Got(file, piece, content, order.source, order.edition))
        if len(node.content[file]) == file.pieces and file in node.open:
            self._verify(node, file)

    def _verify(self, node: Node, file: File) -> None:
        def verified() -> None:
            right = all(c == _right(file, p) for p, c in node.content[file].items())
            if right or node.is_liar:
                node.open.discard(file)
                node.say("proven", file)
            else:
                node.content[file] = {}
                node.say("refuted", (file, node.edition[file]))

        self._at(self.now + file.size / self.world.hash_rate, verified)


def _right(file: File, piece: int) -> str:
    return f"{file.etag}/{piece}"


def whole_copies_s(world: World, count: int, one_copy_s: float) -> float:
    """Return how long it takes if nodes share whole copies alone, as this package did before.

    One node takes all from the Hub while the others wait; then they all take it from that one,
    whose line they share, and hash it.
    """
    total = sum(file.size for file in world.files)
    hashing_s = max(file.size for file in world.files) / world.hash_rate
    return one_copy_s + (count - 1) * total / world.line + (hashing_s if count > 1 else 0.0)


def starters(count: int, *, liars: int = 0, over_s: float = 2.0, seed: int = 0) -> list[Node]:
    """Return nodes that join within some seconds; those that lie come first."""
    chance = random.Random(seed)  # noqa: S311
    return [
        Node(f"n{n}", 0.0 if n < liars else chance.uniform(0, over_s), is_liar=n < liars)
        for n in range(count)
    ]


def churn(nodes: list[Node], *, share: float, until_s: float, seed: int = 0) -> list[Node]:
    """Let a share of the honest nodes die at some time, and as many others join."""
    chance = random.Random(seed)  # noqa: S311
    honest = [node for node in nodes if not node.is_liar]
    dying = chance.sample(honest, max(1, round(len(honest) * share)))
    for node in dying:
        node.dies_at = chance.uniform(0, until_s)
    late = [Node(f"late{n}", chance.uniform(0, until_s)) for n in range(len(dying))]
    return [*nodes, *late]


CASES: dict[str, tuple[Callable[[int], list[Node]], dict[str, Any]]] = {
    "all honest": (starters, {}),
    "one liar": (lambda count: starters(count, liars=1), {}),
    "a tenth dies and as many join": (
        lambda count: churn(starters(count), share=0.1, until_s=120),
        {},
    ),
    "both": (lambda count: churn(starters(count, liars=1), share=0.1, until_s=120), {}),
    "by the Xet client": (starters, {"chunked": True}),
    "one node has all": (starters, {"seeds": ("seed",)}),
}


HEAD = """# Weights on many nodes, simulated

`python -m scripts.bench.swarm` runs the swarm's own decisions (`serve_app/weights/swarm.py`) over
a modelled network: 140 GB in 30 files, pieces of 64 MiB, 25 Gbit/s a node each way, of which one
transfer gets an eighth, 1 GB/s from the Hub in all, a file hashed at 1 GB/s. The liar lies about
hashes and about bytes. The last two columns: sharing whole copies alone, as before.
"""


def main() -> int:
    """Print the table, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", default="4,40,400", help="how many, separated by commas")
    parser.add_argument("--cases", default=",".join(CASES), help="which, separated by commas")
    parser.add_argument("--out", type=Path, help="write the table there too")
    args = parser.parse_args()
    world = World(model(140_000_000_000, 30, PIECE_BYTES))
    total = sum(file.size for file in world.files)
    one_copy_s = _took(Simulation(world, starters(1)))[0]
    line_s = total / world.line + max(file.size for file in world.files) / world.hash_rate
    lines = [
        HEAD,
        f"One copy by one node, the last file's hash included: {one_copy_s:.0f} s from the Hub, "
        f"{line_s:.0f} s from another node.",
        "",
        "| nodes | case | slowest node (s) | ÷ one copy | Hub bytes ÷ weights "
        "| most given by a node ÷ weights | whole copies (s) | ÷ one copy |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    print("\n".join(lines), flush=True)
    for count in map(int, args.nodes.split(",")):
        for case in args.cases.split(","):
            lines.append(_row(world, count, case, one_copy_s))
            print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _row(world: World, count: int, case: str, one_copy_s: float) -> str:
    make, options = CASES[case]
    simulation = Simulation(world, make(count), **options)
    slowest, _ = _took(simulation)
    total = sum(file.size for file in world.files)
    before = whole_copies_s(world, count, one_copy_s)
    base = one_copy_s
    if "seeds" in options:  # nobody asks the Hub: the line of the one is the limit
        hashing_s = max(file.size for file in world.files) / world.hash_rate
        base = total / world.line + hashing_s
        before = count * total / world.line + hashing_s
    given = max(node.given for node in simulation.nodes.values())
    return (
        f"| {count} | {case} | {slowest:.0f} | {slowest / base:.2f} "
        f"| {simulation.hub_bytes / total:.3f} | {given / total:.2f} "
        f"| {before:.0f} | {before / base:.1f} |"
    )


def _took(simulation: Simulation) -> tuple[float, list[float]]:
    """Run it; returns the time of the slowest node that lives, and of all, each from its join."""
    simulation.run()
    took = [
        node.done_at - node.joins_at
        for node in simulation.nodes.values()
        if node.done_at is not None and not node.is_liar and node.name not in simulation.seeds
    ]
    return max(took), took


if __name__ == "__main__":
    raise SystemExit(main())
