"""Weights once per cluster: nodes with a cache each that share what they ask the Hub for."""

import os
import time
from pathlib import Path

import pytest

from scripts.local_hub import LocalHub, Repo
from serve_app.weights.lifetime import NAMESPACE
from tests.integration import fetching
from tests.integration.conftest import cluster_of
from tests.integration.fetching import WEIGHTS
from tests.integration.homes import make_homes, nodes_at_home
from tests.weights.conftest import serve_other_bytes

pytestmark = pytest.mark.cluster

SIZE = 24 << 20
PROCESSES = 2  # on each node, at the same time


class Nodes:
    """Four nodes with a token and a cache each, and a Hub."""

    def __init__(self, hub, running, homes):
        self.hub, self.running, self.homes = hub, running, homes
        self._repos = 0

    def new_repo(self):
        """Put a repository with weights of its own on the Hub; returns its id and commit."""
        self._repos += 1
        repo = Repo(f"acme/shared-{self._repos}", {WEIGHTS: os.urandom(SIZE), "config.json": b"{}"})
        self.hub.add_repo(repo)
        self.hub.clear_log()
        return repo

    def start(self, node, repo, silent_s=15.0, **options):
        """Fetch a repository onto a node; the options are those of `fetch_here`."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        ids = {known["NodeName"]: known["NodeID"] for known in ray.nodes() if known["Alive"]}
        task = ray.remote(fetching.fetch_here).options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(ids[node], soft=False),
        )
        return task.remote(repo.repo_id, repo.sha, self.hub.url, silent_s, **options)

    def blob(self, node, repo):
        """Return the path of the weights in a node's cache."""
        folder = self.homes[node] / "hub" / f"models--{repo.repo_id.replace('/', '--')}"
        return folder / "blobs" / repo.files(repo.sha)[WEIGHTS].sha256

    def sent(self):
        """Return the bytes of weights that the Hub sent."""
        return sum(entry.bytes_sent for entry in self.hub.log if entry.origin == "cdn")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    homes = make_homes("abcd", tmp_path_factory.mktemp("homes"))
    with LocalHub() as hub, cluster_of(*nodes_at_home(hub, homes)) as running:
        yield Nodes(hub, running, homes)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_fetch_on_many_nodes_asks_the_hub_once(nodes, count, record_testsuite_property):
    """However many nodes and processes start at once, and every byte is the right one."""
    import ray

    repo = nodes.new_repo()
    places = [name for name in "abcd"[:count] for _ in range(PROCESSES)]
    results = ray.get([nodes.start(name, repo) for name in places], timeout=120)
    right = repo.files(repo.sha)[WEIGHTS].sha256
    assert {result["sha256"] for result in results} == {right}
    assert nodes.sent() == SIZE
    total = SIZE + 2
    assert sum(result["hub_bytes"] for result in results) == total
    assert sum(result["peer_bytes"] for result in results) == total * (count - 1)
    assert sum(result["cache_bytes"] for result in results) == total * count * (PROCESSES - 1)
    requests = [entry for entry in nodes.hub.log if entry.origin == "hub"]
    record_testsuite_property(f"hub_requests_{count}_nodes", len(requests))
    # A listing and config.json for each node, which say what to take; the weights once.
    assert len(requests) == 2 * count + 1
    assert not any(entry.authorization_leaked for entry in nodes.hub.log)


def test_fetch_waits_for_a_slow_hub(nodes):
    """Who asks it makes progress, so nobody else does."""
    import ray

    repo = nodes.new_repo()
    slow_down(repo, pause_s=0.2)
    results = ray.get([nodes.start(name, repo, silent_s=2.0) for name in "ab"], timeout=120)
    assert nodes.sent() == SIZE
    assert {result["sha256"] for result in results} == {repo.files(repo.sha)[WEIGHTS].sha256}


def test_fetch_replaces_a_tracker_that_dies(nodes):
    """Who takes part says again what it has; what was on its way from the Hub comes twice."""
    import ray

    repo = nodes.new_repo()
    slow_down(repo, pause_s=0.2)
    begun = [nodes.start(name, repo, piece_bytes=1 << 20) for name in "ab"]
    wait_until(lambda: nodes.sent() > 4 << 20)
    ray.kill(ray.get_actor("weights/tracker", namespace=NAMESPACE))
    results = ray.get(begun, timeout=60)
    assert {result["sha256"] for result in results} == {repo.files(repo.sha)[WEIGHTS].sha256}
    assert SIZE <= nodes.sent() < 1.7 * SIZE


def test_fetch_replaces_a_node_that_is_killed(nodes):
    """What it had goes on from there, to others at once and to itself when it is back."""
    import ray

    repo = nodes.new_repo()
    slow_down(repo, pause_s=0.2)
    few = {"silent_s": 2.0, "piece_bytes": 1 << 20}
    first = nodes.start("a", repo, **few)
    begun = Path(f"{nodes.blob('a', repo)}.incomplete")
    wait_until(lambda: begun.exists() and begun.stat().st_size > 2 << 20)
    second = nodes.start("b", repo, **few)
    time.sleep(1.0)
    ray.cancel(first, force=True)
    del repo.files(repo.sha)[WEIGHTS].open
    result = ray.get(second, timeout=60)
    assert result["hub_bytes"] + result["peer_bytes"] == SIZE + 2
    assert result["peer_bytes"] >= 1 << 20
    with pytest.raises(ray.exceptions.RayError):
        ray.get(first, timeout=30)
    again = ray.get(nodes.start("a", repo, **few), timeout=60)
    assert (again["hub_bytes"], again["sha256"]) == (0, result["sha256"])
    assert 0 < again["peer_bytes"] < SIZE  # it had begun


@pytest.mark.parametrize("fault", ["other bytes", "no file"])
def test_fetch_passes_over_a_peer_that_gives_something_else(nodes, fault):
    """Its bytes are found out, or are not there; the Hub gives the right ones."""
    import ray

    repo = nodes.new_repo()
    ray.get(nodes.start("a", repo), timeout=60)
    blob = nodes.blob("a", repo)
    content = blob.read_bytes()
    blob.unlink()
    if fault == "other bytes":
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    result = ray.get(nodes.start("b", repo), timeout=60)
    assert result["sha256"] == repo.files(repo.sha)[WEIGHTS].sha256
    assert nodes.sent() == 2 * SIZE
    again = ray.get(nodes.start("c", repo), timeout=60)
    assert again["sha256"] == result["sha256"]


def test_fetch_does_not_ask_a_node_that_is_lost(nodes):
    """What it had is fetched from the Hub, by the next one once for all."""
    import ray

    repo = nodes.new_repo()
    ray.get(nodes.start("d", repo), timeout=60)
    nodes.running.remove("d")
    wait_until(lambda: "d" not in {n["NodeName"] for n in ray.nodes() if n["Alive"]})
    results = ray.get([nodes.start(name, repo) for name in "ab"], timeout=60)
    assert sum(result["hub_bytes"] for result in results) == SIZE + 2
    assert nodes.sent() == 2 * SIZE


def slow_down(repo, *, pause_s):
    """Let the Hub send the weights one MiB at a time."""
    file = repo.files(repo.sha)[WEIGHTS]
    serve_other_bytes(file, file.open().read(), pause_s=pause_s)


def wait_until(done, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
