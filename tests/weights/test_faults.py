"""What a node's cache survives: killed downloads, wrong bytes, a full disk, a bad connection."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, scan_cache_dir, snapshot_download

from scripts.local_hub import Behaviour, LocalHub, Repo, Route
from serve_app.access.hub import download
from serve_app.errors import AccessDenied, ModelLoadError
from serve_app.weights import store as stores
from serve_app.weights.fetch import fetch
from serve_app.weights.store import Store
from tests.access.cases import MODEL, access, single_files
from tests.conftest import TINY_REPO
from tests.weights.conftest import serve_other_bytes

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub():
    with LocalHub([Repo(TINY_REPO, single_files())]) as running:
        yield running


def commit_of(hub):
    return hub.commits()[TINY_REPO]["main"]


def hub_file(hub, name=WEIGHTS):
    return hub._state.repos[TINY_REPO].files(commit_of(hub))[name]


def cdn(hub):
    """The requests for the weights' bytes."""
    return [entry for entry in hub.log if entry.origin == "cdn" and entry.method == "GET"]


def test_fetch_shares_the_cache_with_other_tools(hub, tmp_path, own_cache):
    """huggingface_hub finds the whole commit offline, and nothing damaged or unfinished."""
    directory = fetch(MODEL, access(hub, tmp_path, hub.issue_token()), commit_of(hub)).directory
    hub.clear_log()
    found = snapshot_download(
        TINY_REPO, revision=commit_of(hub), cache_dir=own_cache, allow_patterns="*.safetensors",
        endpoint=hub.url,
    )  # fmt: skip
    assert Path(found) == directory.resolve()
    assert hub.log == []
    scanned = scan_cache_dir(own_cache)
    (repo,) = scanned.repos
    (revision,) = repo.revisions
    assert {file.file_name for file in revision.files} == set(single_files()) - {"README.md"}
    blob = (directory / WEIGHTS).resolve()
    assert blob.name == hashlib.sha256(blob.read_bytes()).hexdigest()


def test_fetch_on_a_warm_node_asks_and_hashes_nothing(hub, tmp_path, monkeypatch):
    """The second replica of a node, and the next start of the first."""
    config = access(hub, tmp_path, hub.issue_token())
    first = fetch(MODEL, config, commit_of(hub))
    hub.clear_log()
    monkeypatch.setattr(Store, "_hash", None)
    again = fetch(MODEL, config, commit_of(hub))
    assert hub.log == []
    assert (first.cache_bytes, again.hub_bytes) == (0, 0)
    assert first.hub_bytes == again.cache_bytes > 1024


@pytest.mark.parametrize("how", ["flipped", "cut", "lost"])
def test_fetch_replaces_a_damaged_file_and_no_other(hub, tmp_path, how):
    """Other bytes of the same length are found as well as missing ones."""
    config = access(hub, tmp_path, hub.issue_token())
    directory = fetch(MODEL, config, commit_of(hub)).directory
    blob = (directory / WEIGHTS).resolve()
    right = blob.read_bytes()
    if how == "lost":
        blob.unlink()
    else:
        blob.write_bytes(right[:-1] + (b"x" if how == "flipped" else b""))
    hub.clear_log()
    assert fetch(MODEL, config, commit_of(hub)).hub_bytes == len(right)
    assert (directory / WEIGHTS).read_bytes() == right
    assert {entry.path.rpartition("/")[2] for entry in hub.log} == {WEIGHTS, blob.name}


def test_fetch_serves_no_damaged_copy_while_the_hub_is_down(hub, tmp_path):
    """A receipt stands for the grant, not for the bytes."""
    config = access(hub, tmp_path, hub.issue_token())
    directory = fetch(MODEL, config, commit_of(hub)).directory
    blob = (directory / WEIGHTS).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelLoadError, match=f"damaged copy .*{WEIGHTS}"):
        fetch(MODEL, config, commit_of(hub), offline=True)


def test_fetch_goes_on_after_a_killed_downloader(tmp_path):
    """Another process goes on where the first one died, and fetches the rest only."""
    files = single_files() | {WEIGHTS: os.urandom(1 << 20) * 32}
    with LocalHub([Repo(TINY_REPO, files)]) as hub:
        config = access(hub, tmp_path, hub.issue_token())
        commit, weights = commit_of(hub), hub_file(hub)
        store = Store(TINY_REPO, commit)
        code = (
            "from huggingface_hub import constants; import sys;"
            "constants.HF_HUB_CACHE = sys.argv[1];"
            "from serve_app.config import AccessConfig, ModelConfig;"
            "from serve_app.weights.fetch import fetch;"
            "fetch(ModelConfig(repo_id=sys.argv[2]),"
            " AccessConfig(endpoint=sys.argv[3], token_file=sys.argv[4]), sys.argv[5])"
        )
        arguments = [constants.HF_HUB_CACHE, TINY_REPO, hub.url, config.token_file, commit]
        serve_other_bytes(weights, files[WEIGHTS], pause_s=0.1)
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT)
        deadline = time.monotonic() + 60
        partial = store.partial(SimpleNamespace(etag=weights.sha256))
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        begun = partial.stat().st_size
        assert 0 < begun < weights.size
        del weights.open  # fast again
        hub.clear_log()
        fetched = fetch(MODEL, config, commit)
        assert (fetched.directory / WEIGHTS).read_bytes() == files[WEIGHTS]
        (request,) = cdn(hub)
        assert request.range == f"bytes={begun}-"
        assert request.bytes_sent == weights.size - begun


def test_fetch_throws_away_what_was_left_behind_wrong(hub, tmp_path):
    """Half a file of rubbish costs one more download, never a wrong weight."""
    store = Store(TINY_REPO, commit_of(hub))
    store.blobs.mkdir(parents=True)
    store.partial(SimpleNamespace(etag=hub_file(hub).sha256)).write_bytes(b"rubbish")
    fetched = fetch(MODEL, access(hub, tmp_path, hub.issue_token()), commit_of(hub))
    assert (fetched.directory / WEIGHTS).read_bytes() == single_files()[WEIGHTS]
    assert len(cdn(hub)) == 2
    assert not list(store.blobs.glob("*.incomplete"))


def test_fetch_reports_a_hub_that_sends_other_bytes_after_the_second_time(hub, tmp_path):
    """Nothing of it is left under a name that anybody looks for."""
    file = hub_file(hub)
    size, _ = file.size, file.sha256
    serve_other_bytes(file, bytes(size))
    with pytest.raises(ModelLoadError, match=f"{WEIGHTS} .* twice with other bytes"):
        fetch(MODEL, access(hub, tmp_path, hub.issue_token()), commit_of(hub))
    store = Store(TINY_REPO, commit_of(hub))
    assert not (store.blobs / file.sha256).exists()
    assert not (store.snapshot / WEIGHTS).exists()


def test_fetch_reports_a_disk_that_is_too_small_before_the_first_byte(hub, tmp_path, monkeypatch):
    """Bytes needed, bytes free, the place, and which old revisions could go."""
    config = access(hub, tmp_path, hub.issue_token())
    old = commit_of(hub)
    fetch(MODEL, config, old)
    hub._state.repos[TINY_REPO].push(single_files() | {WEIGHTS: os.urandom(5000)})
    hub.clear_log()
    monkeypatch.setattr(
        stores.shutil, "disk_usage", lambda path: SimpleNamespace(free=1234, total=0, used=0)
    )
    with pytest.raises(ModelLoadError) as caught:
        fetch(MODEL, config, commit_of(hub))
    message = caught.value.message
    assert "5,000 more bytes in" in message
    assert constants.HF_HUB_CACHE in message
    assert "1,234 are free" in message
    assert f"`hf cache rm {old}` frees {len(single_files()[WEIGHTS]):,}" in message
    assert caught.value.details == {"needed_bytes": 5000, "free_bytes": 1234}
    assert cdn(hub) == []


def test_fetch_reports_old_revisions_and_leaves_them(hub, tmp_path, monkeypatch):
    """They make the rollback fast; what they share with others is not counted."""
    reported = []
    monkeypatch.setattr(
        "serve_app.weights.fetch.log",
        SimpleNamespace(info=lambda event, **facts: reported.append((event, facts))),
    )
    config = access(hub, tmp_path, hub.issue_token())
    old = commit_of(hub)
    first = fetch(MODEL, config, old).directory
    hub._state.repos[TINY_REPO].push(single_files() | {WEIGHTS: os.urandom(5000)})
    fetch(MODEL, config, commit_of(hub))
    alone = len(single_files()[WEIGHTS])
    assert reported == [("weights.outdated", {"repo_id": TINY_REPO, "revisions": {old: alone}})]
    assert (first / WEIGHTS).read_bytes() == single_files()[WEIGHTS]


def test_fetch_goes_on_over_a_connection_that_breaks(tmp_path, monkeypatch):
    """A CDN that cuts every answer in half: what came stays, the next try fetches the rest."""
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 256)
    files = single_files() | {WEIGHTS: os.urandom(4096)}
    with LocalHub([Repo(TINY_REPO, files)]) as hub:
        token = hub.issue_token(Behaviour.cdn_cut)
        config = access(hub, tmp_path, token)
        with pytest.raises(ModelLoadError, match="broke off"):
            fetch(MODEL, config, commit_of(hub))
        hub.set_behaviour(token, Behaviour.granted)
        fetched = fetch(MODEL, config, commit_of(hub))
        assert fetched.hub_bytes <= 512
        assert (fetched.directory / WEIGHTS).read_bytes() == files[WEIGHTS]


def test_fetch_asks_a_hub_that_stumbles_again(hub, tmp_path, monkeypatch):
    """Two 503s cost a moment, not the start."""
    monkeypatch.setattr(download.time, "sleep", lambda _: None)
    token = hub.issue_token(Behaviour.flaky, on=[Route.resolve], failures=2)
    fetched = fetch(MODEL, access(hub, tmp_path, token), commit_of(hub))
    assert (fetched.directory / WEIGHTS).is_file()


def test_fetch_does_not_believe_a_listing_made_without_access(hub, tmp_path):
    """The Hub masks the hashes for strangers; whoever is granted later lists anew."""
    token = hub.issue_token(Behaviour.pending)
    config = access(hub, tmp_path, token)
    with pytest.raises(AccessDenied, match="awaiting a review"):
        fetch(MODEL, config, commit_of(hub))
    store = Store(TINY_REPO, commit_of(hub))
    assert not list(store.blobs.parent.glob("trees/*"))
    assert not store.snapshot.exists()  # which other tools would take for a copy
    hub.set_behaviour(token, Behaviour.granted)
    assert fetch(MODEL, config, commit_of(hub)).hub_bytes > 0


def test_fetch_checks_the_chunk_stores_bytes_and_takes_http_if_they_are_wrong(
    hub, tmp_path, monkeypatch
):
    """Its client checks sizes only."""
    hub._state.repos[TINY_REPO].xet = True
    asked = []

    def transfer(_key, files, *, pace):
        asked.extend(files)
        for file in files:
            Path(file.path).write_bytes(bytes(file.size))

    monkeypatch.setattr(download.xet, "fetch", transfer)
    fetched = fetch(MODEL, access(hub, tmp_path, hub.issue_token()), commit_of(hub))
    assert [file.size for file in asked] == [len(single_files()[WEIGHTS])]
    assert (fetched.directory / WEIGHTS).read_bytes() == single_files()[WEIGHTS]
    assert len(cdn(hub)) == 1
    assert not list(Store(TINY_REPO, commit_of(hub)).blobs.glob("*incomplete*"))
