"""Weights for this machine alone, as an init container fetches them."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cli import prefetch
from serve_app.cli.main import main
from tests.access.cases import ADAPTER_REPO, adapter_files, single_files
from tests.conftest import TINY_REPO


@pytest.fixture
def hub():
    with LocalHub([Repo(TINY_REPO, single_files()), Repo(ADAPTER_REPO, adapter_files())]) as hub:
        yield hub


@pytest.fixture
def call(hub, monkeypatch, tmp_path, capsys):
    """Call the command with a token, in a folder; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "token").write_text(hub.issue_token())
    model = {"repo_id": TINY_REPO, "adapters": [{"name": "legal", "repo_id": ADAPTER_REPO}]}
    args = {
        "model": model,
        "access": {"endpoint": hub.url, "token_file": str(tmp_path / "token")},
        "engine": {"backend": "vllm"},
        "replica": {"num_gpus": 0},
    }
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    (tmp_path / "app.yaml").write_text(yaml.safe_dump({"applications": [app]}))

    def run(*options):
        code = main(["prefetch", str(tmp_path / "app.yaml"), *options])
        return code, capsys.readouterr().out

    return run


def test_prefetch_this_node_fetches_and_links(call, tmp_path):
    """The model under the name that is asked for, the adapter beside it; again at no cost."""
    link = tmp_path / "model"
    code, said = call("--this-node", "--link", str(link))
    assert code == 0, said
    assert "Access granted" in said
    assert (link / "model.safetensors").is_file()
    assert (tmp_path / "model.legal" / "adapter_model.safetensors").is_file()
    code, said = call("--this-node", "--link", str(link), "--json")
    fetched = [json.loads(line) for line in said.splitlines()[1:]]
    assert [each["application"] for each in fetched] == ["llm", "llm, legal"]
    assert [each["hub_bytes"] for each in fetched] == [0, 0]
    assert link.resolve().name == fetched[0]["commit"]


def test_prefetch_this_node_refused_fetches_nothing(call, hub, tmp_path):
    """Of the model neither, if an adapter is refused."""
    token = (tmp_path / "token").read_text()
    hub.set_behaviour(token, Behaviour.never_asked, repo_id=ADAPTER_REPO)
    code, said = call("--this-node", "--link", str(tmp_path / "model"))
    assert code == 3
    assert "license_not_accepted" in said
    assert not (tmp_path / "model").is_symlink()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("file", "is no link, and stays as it is"),
        ("folder", "is no link, and stays as it is"),
        ("file/model", "file is no directory"),
        ("nowhere/model", "nowhere is no directory"),
        ("beside", "is no link, and stays as it is"),
        ("x" * 250, "File name too long"),
        ("..", "the link's own name"),
        ("/", "the link's own name"),
        (".", "the link's own name"),
    ],
)
def test_prefetch_this_node_refuses_a_link_before_it_asks_or_fetches(
    call, hub, tmp_path, capsys, link, words
):
    """A file in its place, or in an adapter's, is not replaced."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "beside.legal").write_text("mine")
    assert main(["prefetch", str(tmp_path / "app.yaml"), "--this-node", "--link", link]) == 2
    assert words in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == (tmp_path / "beside.legal").read_text() == "mine"
    assert hub.log == []


def test_prefetch_this_node_refuses_a_parent_that_cannot_be_written(call, tmp_path, monkeypatch):
    """Whatever the reason is: a mount that is only read, somebody else's folder."""
    monkeypatch.setattr(prefetch.os, "access", lambda place, _mode: place != tmp_path)
    assert call("--this-node", "--link", str(tmp_path / "model"))[0] == 2
    assert not (tmp_path / "cache").exists()


def test_prefetch_this_node_replaces_links(call, tmp_path, monkeypatch):
    """One that leads nowhere and one to elsewhere; what it led to stays, and so do others' names.

    A process that was killed in between may have had the same id, and leaves nothing in the way.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "cache")  # links lead from where they lie
    (tmp_path / "old").mkdir()
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "model"
    link.symlink_to(tmp_path / "old")
    link.with_name("model.legal").symlink_to(tmp_path / "none")
    link.with_name(f".model.{os.getpid()}").symlink_to(tmp_path / "killed")
    assert call("--this-node", "--link", "links/model")[0] == 0
    assert (link / "model.safetensors").is_file()
    assert (tmp_path / "links" / "model.legal" / "adapter_config.json").is_file()
    assert (tmp_path / "old").is_dir()
    assert len(list((tmp_path / "links").iterdir())) == 3


def test_prefetch_this_node_links_all_or_none(call, hub, tmp_path, monkeypatch):
    """A new model beside an old adapter is nothing that somebody asked for."""
    fetch = prefetch.fetch_here

    def failing(model, access, commit):
        hub.set_behaviour((tmp_path / "token").read_text(), Behaviour.never_asked)
        return fetch(model, access, commit)

    monkeypatch.setattr(prefetch, "fetch_here", failing)
    code, said = call("--this-node", "--link", str(tmp_path / "model"))
    assert (code, (tmp_path / "model").is_symlink()) == (5, False)
    assert "not there" in said


def test_link_of_two_at_once(tmp_path):
    """A reader finds one of both at any time, and nothing else is left."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    place = tmp_path / "links" / "model"
    place.parent.mkdir()
    prefetch._link(place, tmp_path / "a")

    def again(name):
        for _ in range(100):
            prefetch._link(place, tmp_path / name)

    with ThreadPoolExecutor(2) as pool:
        linking = [pool.submit(again, name) for name in "ab"]
        while not all(each.done() for each in linking):
            assert (place / "is").read_text() in "ab"
        for each in linking:
            each.result()
    assert list(place.parent.iterdir()) == [place]


def test_prefetch_this_node_links_a_directory(call, tmp_path):
    """Of `model.path` nothing is fetched, its adapters are."""
    (tmp_path / "mine").mkdir()
    for name, content in single_files().items():
        (tmp_path / "mine" / name).write_bytes(content)
    config = yaml.safe_load((tmp_path / "app.yaml").read_text())
    model = config["applications"][0]["args"]["model"]
    model["path"], model["repo_id"] = str(tmp_path / "mine"), None
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(config))
    assert call("--this-node", "--link", str(tmp_path / "model"))[0] == 0
    assert (tmp_path / "model").resolve() == tmp_path / "mine"
    assert (tmp_path / "model.legal" / "adapter_config.json").is_file()
    model["adapters"][0]["name"] = "acme/legal"
    (tmp_path / "app.yaml").write_text(yaml.safe_dump(config))
    assert call("--this-node", "--link", str(tmp_path / "model"))[0] == 2


def test_prefetch_link_goes_with_this_node(call, tmp_path, capsys):
    """Elsewhere nobody would see it."""
    assert main(["prefetch", str(tmp_path / "app.yaml"), "--link", "/x"]) == 2
    assert "--this-node" in capsys.readouterr().err


def test_prefetch_this_node_without_a_token(call, hub, tmp_path):
    """Exit 3 and where it was looked for; the words are on the standard output."""
    (tmp_path / "token").unlink()
    code, said = call("--this-node", "--link", str(tmp_path / "model"))
    assert code == 3
    assert "no_token" in said


def test_prefetch_this_node_is_read_by_others(call, tmp_path):
    """Another user's process serves it: files and folders are readable, as far as the umask."""
    assert call("--this-node", "--link", str(tmp_path / "model"))[0] == 0
    link = tmp_path / "model"
    for path in (link.resolve(), *link.iterdir(), *(p.resolve() for p in link.iterdir())):
        assert path.stat().st_mode & 0o004, path
