"""Who leads, who waits, and when nobody waits any more; the bytes themselves cross a cluster."""

import threading
import time
from types import SimpleNamespace

import pytest

from scripts.local_hub import LocalHub, Repo
from serve_app.weights import chunks, peers
from serve_app.weights.fetch import fetch
from serve_app.weights.peers import Peers
from serve_app.weights.store import Store
from tests.access.cases import MODEL, access, single_files
from tests.conftest import TINY_REPO

COMMIT = "c0ffee" + "0" * 34


@pytest.fixture
def cluster(monkeypatch, kv_store):
    """The store and the nodes that are alive."""
    known = SimpleNamespace(kv=kv_store, alive={"a", "b", "c"})
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


def test_peers_have_one_leader_of_many(cluster, on):
    """However close they come."""
    nodes = [on(node) for node in "abc"]
    won = []
    threads = [threading.Thread(target=lambda n=node: won.append(n._leads())) for node in nodes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(won) == [False, False, True]


def test_peers_follow_a_leader_that_gives_up_at_once(cluster, on):
    """Its claim is gone with it, whatever went wrong."""
    first, second = on("a"), on("b")
    assert first._leads()
    with pytest.raises(ValueError, match="no"), first.taking_part(Store(TINY_REPO, COMMIT)):
        raise ValueError("no")
    assert cluster.kv.held == {}
    assert second._leads()


def test_peers_follow_a_lost_node_at_once(cluster, on):
    """Ray says that it is gone."""
    assert on("a")._leads()
    second = on("b")
    assert not second._leads()
    cluster.alive.remove("a")
    assert second._leads()


def test_peers_follow_a_dead_process_of_the_own_node_at_once(cluster, on):
    """The node's lock is ours, so it cannot be alive."""
    assert on("a")._leads()
    assert on("a")._leads()


@pytest.mark.parametrize("sign", ["beat", "bytes"])
def test_peers_follow_a_leader_without_a_sign_of_life(cluster, on, monkeypatch, sign):
    """No beat: the process is dead. No bytes: it is stuck. One of both is not enough."""
    monkeypatch.setattr(peers, "STALL_S", 0.3)
    first, second = on("a"), on("b", silent_s=0.3)
    assert first._leads()
    began = time.monotonic()
    for count in range(1000):
        life = {"beat": 0, "bytes": 0} | {("bytes" if sign == "beat" else "beat"): count}
        first._keys.put("claim/1", first._sign_of_life(beat=life["beat"], size=life["bytes"]))
        if second._leads():
            break
        time.sleep(0.01)
    assert 0.3 <= time.monotonic() - began < 5


def test_peers_wait_for_a_leader_that_makes_progress(cluster, on):
    """For as long as it takes."""
    first, second = on("a"), on("b", silent_s=0.1)
    assert first._leads()
    for count in range(30):
        first._keys.put("claim/1", first._sign_of_life(beat=count, size=count))
        assert not second._leads()
        time.sleep(0.01)


def test_peers_count_the_newest_claim(cluster, on):
    """Who overtook a dead leader leads, and clears its claim away in the end."""
    on("a")._leads()
    cluster.alive.remove("a")
    second, third = on("b"), on("c")
    assert second._leads()
    assert not third._leads()
    second._release()
    assert cluster.kv.held == {}


def test_peers_forget_what_lost_nodes_had(cluster, on):
    """Their places do not pile up in the store."""
    asking = on("b")
    on("a")._keys.put("has/a", "/somewhere")
    assert asking._pick() == "a"
    cluster.alive.remove("a")
    assert asking._pick() is None
    assert cluster.kv.held == {}


def test_peers_without_the_store_all_ask_the_hub(cluster, on, tmp_path):
    """A start never fails for want of a neighbour."""
    cluster.kv.is_lost = True
    with LocalHub([Repo(TINY_REPO, single_files())]) as hub:
        config = access(hub, tmp_path, hub.issue_token())
        commit = hub.commits()[TINY_REPO]["main"]
        fetched = fetch(MODEL, config, commit, peers=on("a"))
    assert (fetched.peer_bytes, fetched.directory.name) == (0, commit)
    assert fetched.hub_bytes > 0


@pytest.mark.parametrize("claim", [b"", b"[]", b"{}", b'{"node": 1}', b"[" * 99_999])
def test_peers_wait_for_no_claim_that_nobody_of_ours_wrote(cluster, on, claim):
    """Whoever may write to the cluster's store can write anything."""
    first = on("a")
    cluster.kv.held["weights/acme/tiny-llama@" + COMMIT + "/claim/1"] = claim
    cluster.kv.held["weights/acme/tiny-llama@" + COMMIT + "/claim/x"] = claim
    assert first._leads()


@pytest.fixture
def copy(cluster, on, tmp_path):
    """A node that has a commit and said so."""
    with LocalHub([Repo(TINY_REPO, single_files())]) as hub:
        commit = hub.commits()[TINY_REPO]["main"]
        store = Store(TINY_REPO, commit)
        config = access(hub, tmp_path, hub.issue_token())
        fetch(MODEL, config, commit)
        on("a")
        peers.Announcements(TINY_REPO, commit).put("has/a", "here")
        weights = hub._state.repos[TINY_REPO].files(commit)["model.safetensors"]
        yield SimpleNamespace(hub=hub, commit=commit, store=store, weights=weights, config=config)


def handed_out(copy, wanted, *, repo_id=TINY_REPO, commit=None):
    return list(chunks.read_chunks(repo_id, commit or copy.commit, wanted))


def test_handed_out_chunks_are_whole_files_in_order(copy, monkeypatch):
    """No chunk holds bytes of two files, and an empty rest has none."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 400)
    content = single_files()["model.safetensors"]
    config = single_files()["config.json"]
    (small,) = (f for f in copy.hub._state.repos[TINY_REPO].files(copy.commit).values()
                if f.path == "config.json")  # fmt: skip
    wanted = [(copy.weights.etag, 3), (small.etag, len(config)), (small.etag, 0)]
    read = handed_out(copy, wanted)
    assert b"".join(read[:-1]) == content[3:]
    assert read[-1] == config
    assert all(len(chunk) <= 400 for chunk in read)
    (copy.store.blobs / copy.weights.etag).unlink()
    (copy.store.snapshot / "model.safetensors").unlink()
    with pytest.raises(chunks.NotOffered):
        handed_out(copy, [(copy.weights.etag, 0)])


@pytest.mark.parametrize(
    "name",
    ["../../../secret", "/etc/passwd", "", ".", "secret", "0" * 64, "0" * 40, "x\0y", None, 7,
     "../refs/main", "not-ours.incomplete"],
)  # fmt: skip
def test_handed_out_are_files_of_the_commit_alone(copy, own_cache, name):
    """Not what lies beside them, above them, or anywhere else."""
    (own_cache / "secret").write_text("secret")
    (copy.store.blobs / "secret").write_text("secret")
    (copy.store.blobs / ("0" * 64)).write_text("secret")
    with pytest.raises(chunks.NotOffered):
        handed_out(copy, [(name, 0)])


@pytest.mark.parametrize("start", [-1, "0", None, 1.5])
def test_handed_out_place_in_a_file_is_a_number(copy, start):
    """From the end, say, there is nothing to read."""
    with pytest.raises(chunks.NotOffered):
        handed_out(copy, [(copy.weights.etag, start)])


@pytest.mark.parametrize(
    ("repo_id", "commit"),
    [("../..", None), (TINY_REPO, "../../x"), (TINY_REPO, "main"), (None, None), ("a/b/c", None),
     ("acme/other", None), (TINY_REPO, "0" * 40)],
)  # fmt: skip
def test_handed_out_is_what_was_announced(copy, repo_id, commit):
    """Another repository or commit of its cache, and what names neither, stays here."""
    with pytest.raises(chunks.NotOffered):
        handed_out(copy, [(copy.weights.etag, 0)], repo_id=repo_id, commit=commit)


def test_handed_out_is_nothing_without_an_announcement(cluster, copy):
    """Having the files is not offering them."""
    cluster.kv.held.clear()
    with pytest.raises(chunks.NotOffered, match="did not announce"):
        handed_out(copy, [(copy.weights.etag, 0)])


def test_handed_out_is_no_link_out_of_the_cache(copy, tmp_path):
    """Whoever can write to the cache cannot read more of the node through us."""
    outside = tmp_path / "outside"
    outside.write_text("secret")
    blob = copy.store.blobs / copy.weights.etag
    blob.unlink()
    blob.symlink_to(outside)
    with pytest.raises(chunks.NotOffered, match="outside its cache"):
        handed_out(copy, [(copy.weights.etag, 0)])


class LyingPeer:
    """Sends what it likes instead of the file."""

    def __init__(self, *sent):
        self._sent = iter(sent)

    def __next__(self):
        return next(self._sent)


@pytest.mark.parametrize(
    ("sent", "at_most"),
    [
        ([b"x" * 100_000] * 50, 0),
        ([b"x" * 900] * 50, 1144),
        ([b"x"] * 5000, 1144),
        ([b""] * 5, 0),
        ([{"a": 1}], 0),
        ([None], 0),
        ([], 0),
    ],
    ids=[
        "too long at once",
        "too long in pieces",
        "wrong bytes",
        "nothing",
        "a dict",
        "None",
        "end",
    ],
)
def test_peers_pass_over_a_lying_one_at_the_cost_of_a_file(
    cluster, on, tmp_path, monkeypatch, sent, at_most
):
    """Its bytes are counted against the Hub's list and hashed; then the Hub is asked."""
    monkeypatch.setattr(peers, "_start", lambda *_: LyingPeer(*sent))
    monkeypatch.setattr(peers.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(peers.ray, "get", lambda ref, timeout: ref)
    monkeypatch.setattr(peers.ray, "cancel", lambda ref: None)
    largest = []
    with LocalHub([Repo(TINY_REPO, {"config.json": b"{}", **weights_only()})]) as hub:
        commit = hub.commits()[TINY_REPO]["main"]
        asking = Peers(TINY_REPO, commit) if on("b") else None
        asking._keys.put("has/a", "here")
        receive = asking._receive

        def watched(chunks_, store, file):
            try:
                receive(chunks_, store, file)
            finally:
                largest.append(store.begun_bytes(file))

        monkeypatch.setattr(asking, "_receive", watched)
        config = access(hub, tmp_path, hub.issue_token())
        fetched = fetch(MODEL, config, commit, peers=asking)
        content = weights_only()["model.safetensors"]
        assert (fetched.directory / "model.safetensors").read_bytes() == content
    assert max(largest) <= at_most
    assert asking._passed_over == {"a"}


def weights_only():
    return {"model.safetensors": single_files()["model.safetensors"]}
