"""Who leads, who waits, and when nobody waits any more; the bytes themselves cross a cluster."""

import threading
import time
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from scripts.local_hub import LocalHub, Repo
from serve_app.weights import chunks, peers
from serve_app.weights.bring import bring
from serve_app.weights.peers import Peers
from serve_app.weights.store import Store
from tests.access.cases import MODEL, access, single_files
from tests.conftest import TINY_REPO

COMMIT = "c0ffee" + "0" * 34


class KeyValueStore:
    """Ray's, as far as it is used; atomic as that one is."""

    def __init__(self):
        self.held, self._lock, self.is_lost = {}, threading.Lock(), False

    def _internal_kv_put(self, key, value, overwrite, namespace):
        self._answer()
        with self._lock:
            known = key in self.held
            if overwrite or not known:
                self.held[key] = value.encode()
            return known

    def _internal_kv_get(self, key, namespace):
        self._answer()
        return self.held.get(key)

    def _internal_kv_del(self, key, namespace):
        self._answer()
        self.held.pop(key, None)

    def _internal_kv_list(self, prefix, namespace):
        self._answer()
        return [key.encode() for key in list(self.held) if key.startswith(prefix)]

    def _answer(self):
        if self.is_lost:
            raise RayError("no answer")


@pytest.fixture
def cluster(monkeypatch):
    """The store and the nodes that are alive."""
    known = SimpleNamespace(kv=KeyValueStore(), alive={"a", "b", "c"})
    monkeypatch.setattr(peers, "internal_kv", known.kv)
    monkeypatch.setattr(peers, "_alive", lambda: set(known.alive))
    monkeypatch.setattr(peers, "POLL_S", 0.02)
    monkeypatch.setattr(peers, "BEAT_S", 0.02)
    return known


@pytest.fixture
def on(monkeypatch):
    """Make the `Peers` of a node."""

    def make(node, **limits):
        context = SimpleNamespace(get_node_id=lambda: node)
        monkeypatch.setattr(peers.ray, "get_runtime_context", lambda: context)
        return Peers(TINY_REPO, COMMIT, **limits)

    return make


def test_of_many_one_leads(cluster, on):
    """However close they come."""
    nodes = [on(node) for node in "abc"]
    won = []
    threads = [threading.Thread(target=lambda n=node: won.append(n._leads())) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(won) == [False, False, True]


def test_a_leader_that_gives_up_is_followed_at_once(cluster, on):
    """Its claim is gone with it, whatever went wrong."""
    first, second = on("a"), on("b")
    assert first._leads()
    with pytest.raises(ValueError, match="no"), first.taking_part(Store(TINY_REPO, COMMIT)):
        raise ValueError("no")
    assert cluster.kv.held == {}
    assert second._leads()


def test_a_lost_node_is_followed_at_once(cluster, on):
    """Ray says that it is gone."""
    assert on("a")._leads()
    second = on("b")
    assert not second._leads()
    cluster.alive.remove("a")
    assert second._leads()


def test_a_process_that_died_on_the_own_node_is_followed_at_once(cluster, on):
    """The node's lock is ours, so it cannot be alive."""
    assert on("a")._leads()
    assert on("a")._leads()


@pytest.mark.parametrize("sign", ["beat", "bytes"])
def test_a_leader_without_a_sign_of_life_is_followed(cluster, on, monkeypatch, sign):
    """No beat: the process is dead. No bytes: it is stuck. One of both is not enough."""
    monkeypatch.setattr(peers, "STALL_S", 0.3)
    first, second = on("a"), on("b", silent_s=0.3)
    assert first._leads()
    began = time.monotonic()
    for count in range(1000):
        life = {"beat": 0, "bytes": 0} | {("bytes" if sign == "beat" else "beat"): count}
        first._put("claim/1", first._sign_of_life(beat=life["beat"], size=life["bytes"]))
        if second._leads():
            break
        time.sleep(0.01)
    assert 0.3 <= time.monotonic() - began < 5


def test_a_leader_that_makes_progress_is_waited_for(cluster, on):
    """For as long as it takes."""
    first, second = on("a"), on("b", silent_s=0.1)
    assert first._leads()
    for count in range(30):
        first._put("claim/1", first._sign_of_life(beat=count, size=count))
        assert not second._leads()
        time.sleep(0.01)


def test_the_newest_claim_counts(cluster, on):
    """Who overtook a dead leader leads, and clears its claim away in the end."""
    on("a")._leads()
    cluster.alive.remove("a")
    second, third = on("b"), on("c")
    assert second._leads()
    assert not third._leads()
    second._release()
    assert cluster.kv.held == {}


def test_what_lost_nodes_had_is_forgotten(cluster, on):
    """Their places do not pile up in the store."""
    asking = on("b")
    on("a")._put("has/a", "/somewhere")
    assert asking._pick() == ("a", "/somewhere")
    cluster.alive.remove("a")
    assert asking._pick() is None
    assert cluster.kv.held == {}


def test_without_the_store_everybody_asks_the_hub(cluster, on, tmp_path):
    """A start never fails for want of a neighbour."""
    cluster.kv.is_lost = True
    with LocalHub([Repo(TINY_REPO, single_files())]) as hub:
        config = access(hub, tmp_path, hub.issue_token())
        commit = hub.commits()[TINY_REPO]["main"]
        brought = bring(MODEL, config, commit, peers=on("a"))
    assert (brought.peer_bytes, brought.directory.name) == (0, commit)
    assert brought.hub_bytes > 0


def test_chunks_are_whole_files_in_order_from_where_they_begin(tmp_path, monkeypatch):
    """No chunk holds bytes of two files, and an empty rest has none."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4)
    (tmp_path / "a").write_bytes(b"0123456789")
    (tmp_path / "b").write_bytes(b"xyz")
    read = list(chunks.read_chunks(str(tmp_path), [("a", 3), ("b", 3), ("b", 0)]))
    assert read == [b"3456", b"789", b"xyz"]
    with pytest.raises(FileNotFoundError):
        list(chunks.read_chunks(str(tmp_path), [("c", 0)]))
