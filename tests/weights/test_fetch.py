"""The way of a pinned commit to a node: what is fetched, how often, and in which words it fails."""

import pickle
import threading
import time
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access.hub import download
from serve_app.access.hub.pace import Stalled
from serve_app.config import ModelConfig
from serve_app.errors import AccessDenied, ModelLoadError
from serve_app.weights import fetch as weights_bring
from serve_app.weights.fetch import fetch
from tests.access.cases import MODEL, access, fake_token, sharded_files
from tests.conftest import TINY_REPO
from tests.weights.conftest import serve_other_bytes

EXTRA = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"code",
    "original/consolidated.safetensors": b"x" * 64,
    "tokenizer.model": b"t",
    "merges.txt": b"m",
    "chat_template.jinja": b"j",
}


@pytest.fixture
def hub():
    with LocalHub([Repo(TINY_REPO, sharded_files() | EXTRA)]) as running:
        yield running


def commit_of(hub):
    return hub.commits()[TINY_REPO]["main"]


def test_fetch_takes_weights_configs_and_tokenizer_and_nothing_that_runs(hub, tmp_path):
    """No pickles, no code, no second copy in another format."""
    config = access(hub, tmp_path, hub.issue_token())
    directory = fetch(MODEL, config, commit_of(hub)).directory
    found = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    wanted = {"tokenizer.model", "merges.txt", "chat_template.jinja"}
    assert found == set(sharded_files()) | wanted
    assert directory.name == commit_of(hub)
    assert not any(entry.authorization_leaked for entry in hub.log)


def test_fetch_is_shared_by_the_replicas_of_one_node(hub, tmp_path):
    """However many start at once, each shard is fetched once."""
    config = access(hub, tmp_path, hub.issue_token())
    found: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(fetch(MODEL, config, commit_of(hub)).directory)
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(found)) == 1
    assert len(found) == 4
    fetched = [entry.path for entry in hub.log if entry.origin == "cdn" and entry.method == "GET"]
    assert len(fetched) == len(set(fetched)) == 2


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        (Behaviour.never_asked, "not in the authorized list"),
        (Behaviour.fine_grained, "fine-grained token settings"),
        (Behaviour.invalid, "401"),
        (Behaviour.expired, "expired"),
    ],
)
def test_fetch_reports_a_refusal_in_the_hubs_words(hub, tmp_path, behaviour, words):
    """A 403 too, which huggingface_hub reports as `check your connection`; no secret goes along."""
    token = hub.issue_token(behaviour)
    with pytest.raises(AccessDenied, match=words) as caught:
        fetch(MODEL, access(hub, tmp_path, token), commit_of(hub))
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert token.encode() not in pickle.dumps(caught.value)


def test_fetch_reports_a_hub_out_of_reach_as_no_denial(hub, tmp_path, monkeypatch):
    """Another error, which may pass."""
    monkeypatch.setattr(time, "sleep", lambda _: None)  # huggingface_hub's own retries
    config = access(hub, tmp_path, hub.issue_token())
    commit = commit_of(hub)
    hub.stop()
    try:
        with pytest.raises(ModelLoadError, match=r"broke off: no connection to 127\.0\.0\.1"):
            fetch(MODEL, config, commit)
    finally:
        hub.start()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (httpx2.ReadError("reset"), r"broke off \(ReadError\)"),
        (httpx2.ConnectTimeout("slow"), r"broke off \(ConnectTimeout\)"),
        (ValueError("a header that is none"), r"broke off \(ValueError\)"),
        (Stalled("few bytes"), "stands still: few bytes"),
    ],
)
def test_fetch_reports_other_failures_in_one_clean_sentence(
    hub, tmp_path, monkeypatch, error, words
):
    """Disk, connection, pace: no exception of another library leaves."""

    def fail(*_args, **_options):
        raise error

    monkeypatch.setattr(download.transfer, "append", fail)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    with pytest.raises(ModelLoadError, match=words):
        fetch(MODEL, access(hub, tmp_path, hub.issue_token()), commit_of(hub))


def test_fetch_reports_a_broken_token_before_the_download(hub, tmp_path):
    """The file may have been rotated to nonsense since the gate."""
    with pytest.raises(AccessDenied, match="quotes"):
        fetch(MODEL, access(hub, tmp_path, f"'{fake_token()}'"), "0" * 40)


def test_fetch_without_a_commit_is_refused(hub, tmp_path):
    """A branch name is never downloaded."""
    with pytest.raises(ModelLoadError, match="the gate must come first"):
        fetch(MODEL, access(hub, tmp_path, None), None)


def test_fetch_takes_a_local_directory_as_it_is(hub, tmp_path):
    """Nothing is asked or copied."""
    model = ModelConfig(path=str(tmp_path))
    assert fetch(model, access(hub, tmp_path, None), None).directory == tmp_path
    assert hub.log == []


def test_fetch_reports_the_bytes_as_they_come(tmp_path, monkeypatch):
    """Growing, from what was begun, of the right total; and no more when all is here."""
    monkeypatch.setattr(weights_bring, "TELL_S", 0.02)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 20)
    content = bytes(8 << 20)
    repo = Repo(TINY_REPO, {"config.json": b"{}", "model.safetensors": content})
    with LocalHub([repo]) as hub:
        serve_other_bytes(repo.files(repo.sha)["model.safetensors"], content, pause_s=0.05)
        config = access(hub, tmp_path, hub.issue_token())
        reported: list[tuple[int, int]] = []
        fetch(MODEL, config, repo.sha, progress=lambda *bytes_: reported.append(bytes_))
        done = [each for each, _ in reported]
        assert {total for _, total in reported} == {len(content) + 2}
        assert done == sorted(done)
        assert len(set(done)) > 3
        fetch(MODEL, config, repo.sha, progress=lambda *bytes_: reported.append(bytes_))
        count = len(reported)
        time.sleep(0.1)
        assert len(reported) == count
