"""What a node makes of a swarm's orders: pieces from nodes that lie or die, and from the Hub."""

import os
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.exceptions import RayError

from scripts.local_hub import LocalHub, Repo
from serve_app.access.hub import download
from serve_app.errors import ModelLoadError
from serve_app.weights import chunks, partial, peers, taking
from serve_app.weights.announcements import Announcements
from serve_app.weights.fetch import fetch
from serve_app.weights.peers import Peers
from serve_app.weights.pieces import File
from serve_app.weights.store import Store
from serve_app.weights.swarm import Swarm, Unknown
from tests.access.cases import MODEL, access
from tests.conftest import TINY_REPO
from tests.weights.conftest import serve_other_bytes

PIECE = 1000
CONTENT = os.urandom(10 * PIECE - 300)
WEIGHTS = "model.safetensors"


def digest(piece, content=CONTENT):
    return sha256(content[piece * PIECE : (piece + 1) * PIECE]).hexdigest()


class Track:
    """The tracker without its actor; some calls may find it gone."""

    def __init__(self, swarm, name, lose=()):
        self.swarm, self.name, self.now, self.calls = swarm, name, 100.0, 0
        self.lose = set(lose)

    def _call(self):
        self.calls += 1
        self.now += 0.01
        if self.calls in self.lose:
            self.swarm.leave(self.name)

    def join(self, files, **said):
        return self.swarm.join(self.name, files, now=self.now, **said)

    def exchange(self, report):
        self._call()
        return self.swarm.exchange(self.name, report, now=self.now)._replace(wait_s=0.005)

    def leave(self):
        self.swarm.leave(self.name)


@pytest.fixture
def stage(kv_store, monkeypatch, tmp_path):
    """A Hub, this node `a`, and nodes that a test describes."""
    monkeypatch.setattr(peers, "member_name", lambda: "a")
    monkeypatch.setattr(chunks, "member_name", lambda: "a")
    monkeypatch.setattr(peers, "living_nodes", lambda: {"a", "b", "c"})
    swarm = Swarm(seed=1)
    with LocalHub([Repo(TINY_REPO, {"config.json": b"{}", WEIGHTS: CONTENT})]) as hub:
        commit = hub.commits()[TINY_REPO]["main"]
        file = hub._state.repos[TINY_REPO].files(commit)[WEIGHTS]
        stage = SimpleNamespace(
            hub=hub,
            kv=kv_store,
            commit=commit,
            file=file,
            cut=File(file.sha256, len(CONTENT), PIECE),
            swarm=swarm,
            nodes={},
            asked=[],
            track=Track(swarm, "a"),
            config=access(hub, tmp_path, hub.issue_token()),
            store=Store(TINY_REPO, commit),
        )
        monkeypatch.setattr(peers, "Tracking", lambda *_, **__: stage.track)

        def read(_self, source, etag, span):
            stage.asked.append((source, etag, span))
            yield from stage.nodes[source](span)

        monkeypatch.setattr(Peers, "_read", read)
        stage.fetch = lambda: fetch(
            MODEL, stage.config, commit, peers=Peers(TINY_REPO, commit, piece_bytes=PIECE)
        )
        yield stage


def add(stage, name, pieces, *, gives=lambda span: [CONTENT[slice(*span)]], stated=CONTENT):
    """Let a node have pieces of the weights."""
    here = {piece: digest(piece, stated) for piece in pieces}
    stage.swarm.join(name, [stage.cut], now=100.0, here={stage.cut: here})
    stage.nodes[name] = gives


def sent(stage):
    return sum(entry.bytes_sent for entry in stage.hub.log if entry.origin == "cdn")


def whole(stage, fetched):
    assert (fetched.directory / WEIGHTS).read_bytes() == CONTENT
    assert not list(stage.store.blobs.glob("*incomplete*"))
    return True


def test_peers_give_pieces_and_the_hub_the_rest(stage):
    """Each byte once, and counted where it came from."""
    add(stage, "b", [0, 3, 9])
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert fetched.peer_bytes == 2 * PIECE + PIECE - 300
    assert sent(stage) == len(CONTENT) - fetched.peer_bytes
    assert fetched.hub_bytes == sent(stage) + len(b"{}")
    assert {span for _, _, span in stage.asked} == {(0, 1000), (3000, 4000), (9000, 9700)}
    assert stage.kv.held.keys() == {f"weights/{TINY_REPO}@{stage.commit}/has/a"}


def test_peers_that_have_all_leave_nothing_for_the_hub(stage):
    """In pieces of several, whichever has which."""
    add(stage, "b", range(6))
    add(stage, "c", range(4, 10))
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert sent(stage) == 0
    assert fetched.peer_bytes == len(CONTENT)
    assert {source for source, _, _ in stage.asked} == {"b", "c"}


def test_peers_of_a_cluster_of_one_node(stage, monkeypatch):
    """There is nobody to share with."""
    monkeypatch.setattr(peers, "living_nodes", lambda: {"a"})
    monkeypatch.setattr(peers, "Tracking", None)
    assert whole(stage, stage.fetch())
    assert stage.kv.held.keys() == {f"weights/{TINY_REPO}@{stage.commit}/has/a"}


def dies(_span):
    yield b"x" * 10
    raise taking.Silent("gone")


@pytest.mark.parametrize(
    "gives",
    [
        lambda span: [b"x" * 100_000],
        lambda span: [CONTENT[slice(*span)], b"x"],
        lambda span: [b"x" * (span[1] - span[0])],
        lambda span: [CONTENT[slice(*span)][:-1]],
        lambda span: [],
        dies,
    ],
    ids=["too long at once", "too long in the end", "wrong bytes", "too short", "nothing", "dies"],
)
def test_peers_pass_over_a_node_that_gives_something_else(stage, gives):
    """Found out by the piece, before the file is whole; the Hub gives what only it had."""
    add(stage, "b", range(10), gives=gives)
    assert whole(stage, stage.fetch())
    assert len(stage.asked) <= taking.SLOTS
    assert sent(stage) == len(CONTENT)


def test_peers_find_a_wrong_list_by_the_whole_file(stage):
    """Its author lied about bytes and hashes alike; nobody is given his pieces on from here."""
    lie = bytes(len(CONTENT))
    add(stage, "b", range(10), gives=lambda span: [lie[slice(*span)]], stated=lie)
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert len(stage.asked) == 10
    assert sent(stage) == len(CONTENT)


def test_peers_keep_no_wrong_piece(stage, monkeypatch):
    """It is in no journal, so that no other node gets it from here."""
    add(stage, "b", range(10), gives=lambda span: [bytes(span[1] - span[0])])
    kept, keep = [], partial.Partial.keep

    def watched(self, edition, piece, found):
        kept.append(found)
        keep(self, edition, piece, found)

    monkeypatch.setattr(partial.Partial, "keep", watched)
    assert whole(stage, stage.fetch())
    assert set(kept) == {*map(digest, range(10)), sha256(b"{}").hexdigest()}


def test_peers_report_a_hub_that_sends_other_bytes_twice(stage):
    """As without other nodes."""
    serve_other_bytes(stage.file, bytes(len(CONTENT)))
    with pytest.raises(ModelLoadError, match="twice with other bytes"):
        stage.fetch()
    assert not (stage.store.blobs / stage.file.sha256).exists()


def test_peers_with_a_hub_that_sends_no_parts(stage, monkeypatch):
    """What was not asked for is dropped; what is here stays."""
    add(stage, "b", range(5))
    piece = download.transfer._piece

    def without_parts(client, url, stream, stop, size, pace):
        stream.seek(0)
        stream.truncate()
        piece(client, url, stream, size, size, pace)

    monkeypatch.setattr(download.transfer, "_piece", without_parts)
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert fetched.peer_bytes + fetched.hub_bytes == len(CONTENT) + 2


def test_partial_goes_on_with_what_a_dead_process_left(stage, monkeypatch):
    """Whole pieces alone, each hashed again; a damaged one comes again."""
    add(stage, "b", range(10))
    accept = Store.accept

    def killed(self, file):
        if file.path == WEIGHTS:
            raise ZeroDivisionError
        accept(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "accept", killed)
        with pytest.raises(ZeroDivisionError):
            stage.fetch()
    left = stage.store.blobs / f"{stage.file.sha256}.incomplete"
    assert left.stat().st_size == len(CONTENT)
    with left.open("r+b") as stream:
        stream.seek(4500)
        stream.write(b"????")
    found = partial.Partial(lambda: stage.store._open("blobs"), left.name, stage.cut)
    found.load()
    assert sorted(found.here) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert stage.store.lacking_bytes([SimpleNamespace(etag=stage.file.sha256, size=9700)]) == 1000


def test_peers_without_a_swarm_go_on_from_the_first_byte(stage):
    """What came in order is kept, the rest fetched: a start never fails for want of a neighbour."""
    here = partial.Partial(
        lambda: stage.store._open("blobs", create=True),
        f"{stage.file.sha256}.incomplete",
        stage.cut,
    )
    here.belong(1)
    for piece in (0, 1, 5):
        with here.writing(1) as writer:
            writer.put(piece * PIECE, CONTENT[piece * PIECE : (piece + 1) * PIECE])
            writer.keep(piece, digest(piece))

    class Lost(Track):
        def join(self, files, **said):
            raise RayError("no answer")

    stage.track = Lost(stage.swarm, "a")
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert sent(stage) == len(CONTENT) - 2 * PIECE


@pytest.mark.parametrize("lose", [(1,), (2, 3), range(1, 50)])
def test_peers_join_again_where_they_are_forgotten(stage, lose):
    """With all that is here; one that forgets for ever is left alone."""
    add(stage, "b", range(5))
    stage.track = Track(stage.swarm, "a", lose)
    fetched = stage.fetch()
    assert whole(stage, fetched)


def test_peers_without_the_store_of_keys_ask_the_hub(stage):
    """A start never fails for want of a neighbour."""
    stage.kv.is_lost = True
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert (fetched.peer_bytes, sent(stage)) == (0, len(CONTENT))


def test_peers_of_a_cluster_that_does_not_answer(stage, monkeypatch):
    """Nor is there anybody to say who else is in it."""

    def lost():
        raise RayError

    monkeypatch.setattr(peers, "living_nodes", lost)
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert (fetched.peer_bytes, sent(stage)) == (0, len(CONTENT))


def test_peers_with_a_full_disk(stage, monkeypatch):
    """In one sentence, and the swarm knows that this node is gone."""
    add(stage, "b", range(10))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(partial.os, "pwrite", full)
    with pytest.raises(ModelLoadError, match="No space left on device"):
        stage.fetch()
    with pytest.raises(Unknown):
        stage.swarm.exchange("a", taking.Report(), now=101.0)


def test_peers_take_whole_files_from_the_chunk_store(stage, monkeypatch):
    """One that comes wrong comes over HTTP; nothing of it is given on before."""
    stage.hub._state.repos[TINY_REPO].xet = True
    asked = []

    def transfer(_key, files, *, pace):
        for file in files:
            asked.append(file.size)
            Path(file.path).write_bytes(bytes(file.size))

    monkeypatch.setattr(download.xet, "fetch", transfer)
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert asked == [len(CONTENT)]
    assert sent(stage) == len(CONTENT)


def test_peers_ask_the_chunk_store_for_nothing_that_nodes_have(stage, monkeypatch):
    """A part of it is enough: the rest comes over HTTP."""
    stage.hub._state.repos[TINY_REPO].xet = True
    add(stage, "b", range(5))
    monkeypatch.setattr(download.xet, "fetch", lambda *_, **__: 1 / 0)
    fetched = stage.fetch()
    assert whole(stage, fetched)
    assert fetched.peer_bytes == 5 * PIECE


@pytest.fixture
def copy(stage):
    """This node has the commit and said so."""
    stage.fetch()
    return stage


def handed_out(stage, etag, span, *, repo_id=TINY_REPO, commit=None):
    return b"".join(chunks.read_piece(repo_id, commit or stage.commit, etag, *span))


def test_chunks_are_the_part_that_was_asked_for(copy, monkeypatch):
    """In order, and none longer than others expect."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 400)
    read = list(chunks.read_piece(TINY_REPO, copy.commit, copy.file.sha256, 3, 1500))
    assert b"".join(read) == CONTENT[3:1500]
    assert max(map(len, read)) == 400


def test_chunks_of_a_file_that_is_not_whole(stage):
    """No other part of it: nobody has hashed that."""
    stage.fetch()
    blob = stage.store.blobs / stage.file.sha256
    blob.rename(f"{blob}.incomplete")
    here = partial.Partial(lambda: stage.store._open("blobs"), f"{blob.name}.incomplete", stage.cut)
    here.belong(1)
    here.keep(1, 4, digest(4))
    assert handed_out(stage, blob.name, (4000, 5000)) == CONTENT[4000:5000]
    for span in [(0, 1000), (4000, 4999), (3999, 5000), (0, 9700)]:
        with pytest.raises(chunks.NotOffered):
            handed_out(stage, blob.name, span)


@pytest.mark.parametrize(
    "name",
    ["../../../secret", "/etc/passwd", "", ".", "secret", "0" * 64, "0" * 40, "x\0y", None, 7,
     "../refs/main", "not-ours.incomplete"],
)  # fmt: skip
def test_chunks_are_of_files_of_the_commit_alone(copy, own_cache, name):
    """Not what lies beside them, above them, or anywhere else."""
    (own_cache / "secret").write_text("secret")
    (copy.store.blobs / "secret").write_text("secret")
    (copy.store.blobs / ("0" * 64)).write_text("secret")
    with pytest.raises(chunks.NotOffered):
        handed_out(copy, name, (0, 3))


@pytest.mark.parametrize(
    "span", [(-1, 5), ("0", 5), (None, 5), (1.5, 5), (5, 5), (0, 9701), (True, 5), (0, None)]
)
def test_chunks_are_within_the_file(copy, span):
    """From the end, say, there is nothing to read."""
    with pytest.raises(chunks.NotOffered):
        handed_out(copy, copy.file.sha256, span)


@pytest.mark.parametrize(
    ("repo_id", "commit"),
    [("../..", None), (TINY_REPO, "../../x"), (TINY_REPO, "main"), (None, None), ("a/b/c", None),
     ("acme/other", None), (TINY_REPO, "0" * 40)],
)  # fmt: skip
def test_chunks_are_of_what_was_announced(copy, repo_id, commit):
    """Another repository or commit of its cache, and what names neither, stays here."""
    with pytest.raises(chunks.NotOffered):
        handed_out(copy, copy.file.sha256, (0, 3), repo_id=repo_id, commit=commit)


def test_chunks_are_none_where_nothing_was_announced(copy):
    """Having the files is not offering them."""
    copy.kv.held.clear()
    with pytest.raises(chunks.NotOffered, match="did not announce"):
        handed_out(copy, copy.file.sha256, (0, 3))
    Announcements(TINY_REPO, copy.commit).put("has/b", "")
    with pytest.raises(chunks.NotOffered, match="did not announce"):
        handed_out(copy, copy.file.sha256, (0, 3))


def test_chunks_follow_no_link_out_of_the_cache(copy, tmp_path):
    """Whoever can write to the cache cannot read more of the node through us."""
    outside = tmp_path / "outside"
    outside.write_text("secret")
    blob = copy.store.blobs / copy.file.sha256
    blob.unlink()
    blob.symlink_to(outside)
    with pytest.raises(chunks.NotOffered, match="outside its cache"):
        handed_out(copy, copy.file.sha256, (0, 3))


class LyingPeer:
    """Sends what it likes, by Ray."""

    def __init__(self, *sent):
        self._sent = iter(sent)

    def __next__(self):
        return next(self._sent)


@pytest.mark.parametrize("sent_", [[{"a": 1}], [None], [b""]], ids=["a dict", "None", "empty"])
def test_peers_take_nothing_but_bytes(kv_store, monkeypatch, sent_):
    """Whatever crosses, it is bytes or it is nothing."""
    monkeypatch.setattr(peers, "member_name", lambda: "a")
    monkeypatch.setattr(peers, "start_reading", lambda *_: LyingPeer(*sent_))
    monkeypatch.setattr(peers.ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(peers.ray, "get", lambda ref, timeout: ref)
    monkeypatch.setattr(peers.ray, "cancel", lambda ref: None)
    with pytest.raises(taking.Silent):
        list(Peers(TINY_REPO, "0" * 40)._read("b", "e", (0, 5)))
