"""Caches as they are: read-only, made by other tools, without the kernel's locks."""

import errno
import fcntl
import multiprocessing
import os
import tempfile
import threading
import time

import pytest
from huggingface_hub import constants, snapshot_download

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access.node_check import prove_here
from serve_app.access.verdict import Outcome
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import ModelLoadError
from serve_app.weights import fetch as weights_bring
from serve_app.weights import lock as locks
from serve_app.weights.fetch import fetch
from serve_app.weights.store import Store
from tests.access.cases import MODEL, access, sharded_files, single_files
from tests.conftest import TINY_REPO

WEIGHTS = "model.safetensors"
NOBODY = 65_534


@pytest.fixture
def hub():
    with LocalHub([Repo(TINY_REPO, single_files())]) as running:
        yield running


def commit_of(hub):
    return hub.commits()[TINY_REPO]["main"]


def close_for_writing(folder):
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)


def as_nobody(work, queue):
    """Run in a child process that may not write: root may write anywhere."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        queue.put(("done", work()))
    except ModelLoadError as error:
        queue.put(("refused", error.message))
    except BaseException as error:  # noqa: BLE001 (it has to reach the parent)
        queue.put(("raised", repr(error)))


def unprivileged(work):
    """Return what some work ends with, for a user that may read the cache alone."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=as_nobody, args=(work, queue))
    process.start()
    result = queue.get(timeout=60)
    process.join(20)
    return result


@pytest.fixture
def read_only(hub, tmp_path, own_cache):
    """A complete cache that may only be read, and its commit."""
    above = [each for each in tmp_path.parents if each.is_relative_to(tempfile.gettempdir())]
    for folder in (tmp_path, *above[:-1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    fetch(MODEL, access(hub, tmp_path, hub.issue_token()), commit_of(hub))
    (tmp_path / "token").chmod(0o444)
    close_for_writing(own_cache)
    yield own_cache
    for path in [own_cache, *own_cache.rglob("*")]:
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)


@pytest.mark.parametrize("offline", [False, True])
def test_fetch_serves_from_a_complete_cache_that_cannot_be_written(
    hub, tmp_path, read_only, offline
):
    """No lock, no receipt, no notes are needed, and nothing is asked."""
    commit = commit_of(hub)
    config = AccessConfig(endpoint=hub.url, token_file=str(tmp_path / "token"))
    hub.clear_log()
    how, where = unprivileged(lambda: str(fetch(MODEL, config, commit, offline=offline).directory))
    assert (how, where) == ("done", str(Store(TINY_REPO, commit).snapshot))
    assert hub.log == []


def test_fetch_hashes_and_serves_a_cache_without_notes(hub, tmp_path, read_only):
    """An image's cache, that another user filled."""
    notes = read_only / ".serve-app"
    notes.chmod(0o755)
    for path in sorted(notes.rglob("*"), reverse=True):
        path.parent.chmod(0o755)
        path.rmdir() if path.is_dir() else path.unlink()
    notes.chmod(0o555)
    config = AccessConfig(endpoint=hub.url, token_file=str(tmp_path / "token"))
    how, _ = unprivileged(lambda: str(fetch(MODEL, config, commit_of(hub)).directory))
    assert how == "done"


def test_fetch_names_and_does_not_serve_a_damaged_cache(hub, tmp_path, read_only):
    """Nor can it be repaired."""
    blob = (Store(TINY_REPO, commit_of(hub)).snapshot / WEIGHTS).resolve()
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    blob.chmod(0o444)
    config = AccessConfig(endpoint=hub.url, token_file=str(tmp_path / "token"))
    for offline in (True, False):
        how, words = unprivileged(
            lambda o=offline: str(fetch(MODEL, config, commit_of(hub), offline=o).directory)
        )
        assert how == "refused"
        assert (WEIGHTS in words) if offline else ("cannot be used" in words)


def test_fetch_says_what_is_missing_in_an_incomplete_cache(hub, tmp_path, read_only):
    """And that it cannot be written."""
    snapshot = Store(TINY_REPO, commit_of(hub)).snapshot
    blob = (snapshot / WEIGHTS).resolve()
    for folder in (snapshot, blob.parent):
        folder.chmod(0o755)
    (snapshot / WEIGHTS).unlink()
    blob.unlink()
    for folder in (snapshot, blob.parent):
        folder.chmod(0o555)
    config = AccessConfig(endpoint=hub.url, token_file=str(tmp_path / "token"))
    how, words = unprivileged(lambda: str(fetch(MODEL, config, commit_of(hub)).directory))
    assert how == "refused"
    assert "Permission denied" in words
    assert WEIGHTS in words


def test_fetch_of_a_path_inside_the_cache_serves_offline(hub, read_only, monkeypatch):
    """`model.path` names the snapshot."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = Store(TINY_REPO, commit_of(hub)).snapshot
    model = ModelConfig(path=str(snapshot))

    def start():
        verdict = prove_here(model, AccessConfig())
        return verdict.outcome.value, str(fetch(model, AccessConfig(), None).directory)

    assert unprivileged(start) == ("done", (Outcome.GRANTED.value, str(snapshot)))


def test_prove_here_grants_and_says_that_it_keeps_no_receipt(hub, tmp_path, read_only):
    """A warning, no failure."""
    config = AccessConfig(endpoint=hub.url, token_file=str(tmp_path / "token"))

    def check():
        verdict = prove_here(MODEL, config)
        return verdict.outcome.value, verdict.token.warnings

    how, (outcome, warnings) = unprivileged(check)
    assert (how, outcome) == ("done", "granted")
    # The receipt of the download's proof was never made; the folder cannot be made now.
    assert any("no receipt can be kept" in warning for warning in warnings)


@pytest.mark.parametrize("files", [single_files(), sharded_files()], ids=["single", "sharded"])
def test_fetch_takes_another_tools_copy_while_no_listing_is_to_be_had(
    tmp_path, own_cache, monkeypatch, files
):
    """huggingface_hub's cache names contents by their hashes, so it is verified all the same."""
    with LocalHub([Repo(TINY_REPO, files)]) as hub:
        token = hub.issue_token()
        config = access(hub, tmp_path, token)
        snapshot_download(
            TINY_REPO, revision=commit_of(hub), cache_dir=own_cache, endpoint=hub.url, token=token
        )
        for listing in own_cache.rglob("trees/*.json"):
            listing.unlink()
        hub.clear_log()
        found = fetch(MODEL, config, commit_of(hub), offline=True)
        assert found.cache_bytes > 0
        assert hub.log == []
        # Online, where the Hub counts too many requests just then.
        monkeypatch.setattr(weights_bring, "IMPATIENT_S", 0.5)
        hub.set_behaviour(token, Behaviour.rate_limited)
        assert fetch(MODEL, config, commit_of(hub)).directory == found.directory
        blob = next((found.directory).glob("*.safetensors")).resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")
        with pytest.raises(ModelLoadError, match="damaged copy"):
            fetch(MODEL, config, commit_of(hub), offline=True)


def test_fetch_takes_another_tools_copy_that_cannot_be_written(hub, tmp_path, own_cache):
    """Filled by an older huggingface_hub, mounted read-only: no lock, no listing kept."""
    above = [each for each in tmp_path.parents if each.is_relative_to(tempfile.gettempdir())]
    for folder in (tmp_path, *above[:-1]):
        folder.chmod(folder.stat().st_mode | 0o055)
    token, commit = hub.issue_token(), commit_of(hub)
    config = access(hub, tmp_path, token)
    (tmp_path / "token").chmod(0o444)
    snapshot_download(
        TINY_REPO, revision=commit, cache_dir=own_cache, endpoint=hub.url, token=token
    )
    for listing in own_cache.rglob("trees/*.json"):
        listing.unlink()
    close_for_writing(own_cache)
    try:
        how, where = unprivileged(lambda: str(fetch(MODEL, config, commit).directory))
    finally:
        for path in [own_cache, *own_cache.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o755)
    assert (how, where) == ("done", str(Store(TINY_REPO, commit).snapshot))


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_fetch_puts_files_themselves_where_links_are_not_possible(
    hub, tmp_path, own_cache, monkeypatch, code
):
    """Object stores and shares: each name has its content, also where two have the same."""
    repo = hub._state.repos[TINY_REPO]
    same = {"special_tokens_map.json": b"{}", "generation_config.json": b"{}"}
    repo.push({**single_files(), **same})

    def refuse(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "symlink", refuse)
    config = access(hub, tmp_path, hub.issue_token())
    found = fetch(MODEL, config, commit_of(hub))
    for name, content in {**single_files(), **same}.items():
        if name != "README.md":
            assert (found.directory / name).read_bytes() == content
            assert not (found.directory / name).is_symlink()
    weights = Store(TINY_REPO, commit_of(hub)).blobs.glob("*")
    assert sum(path.stat().st_size for path in weights) < 1000  # no second copy of the weights
    hub.clear_log()
    assert fetch(MODEL, config, commit_of(hub)).hub_bytes == 0
    assert hub.log == []


@pytest.fixture
def no_flock(monkeypatch):
    """A file system without the kernel's locks."""

    def refuse(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize(
    "code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]
)
def test_fetch_goes_on_without_the_kernels_locks(hub, tmp_path, own_cache, monkeypatch, code):
    """NFS mounted nolock, Lustre, object stores: a marker file, and then nothing of it is left."""

    def refuse(*_args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    fetched = fetch(MODEL, access(hub, tmp_path, hub.issue_token()), commit_of(hub))
    assert (fetched.directory / WEIGHTS).read_bytes() == single_files()[WEIGHTS]
    assert not list(own_cache.rglob("*.incomplete"))
    assert not list(own_cache.rglob("*.soft"))


def test_fetch_of_one_process_at_a_time_without_the_kernels_locks(hub, tmp_path, no_flock):
    """As long as it gets on."""
    config = access(hub, tmp_path, hub.issue_token())
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(MODEL, config, commit_of(hub))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    assert len([e for e in hub.log if e.origin == "cdn" and e.method == "GET"]) == 1


def test_fetch_waits_only_so_long_for_a_dead_processs_marker(
    hub, tmp_path, own_cache, no_flock, monkeypatch
):
    """Of another machine that shares the cache: nobody can ask whether it lives."""
    monkeypatch.setattr(locks, "STALL_S", 1.0)
    own = own_cache / ".serve-app"
    own.mkdir(parents=True)
    (own / "acme--tiny-llama.lock.soft").write_text("1\nother-host\n")
    began = time.monotonic()
    fetched = fetch(MODEL, access(hub, tmp_path, hub.issue_token()), commit_of(hub))
    assert 1.0 <= time.monotonic() - began < 20
    assert (fetched.directory / WEIGHTS).read_bytes() == single_files()[WEIGHTS]
    assert not list(own_cache.rglob("*.incomplete"))
