"""Weights for this machine alone, as an init container fetches them."""

import json

import pytest
import yaml
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cli.main import main
from tests.access.cases import ADAPTER_REPO, adapter_files, single_files
from tests.conftest import TINY_REPO


@pytest.fixture
def hub():
    with LocalHub([Repo(TINY_REPO, single_files()), Repo(ADAPTER_REPO, adapter_files())]) as hub:
        yield hub


@pytest.fixture
def call(hub, monkeypatch, tmp_path, capsys):
    """Call the command with a token; returns its exit code and what it printed."""
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


def test_prefetch_this_node_says_where_it_cannot_link(call, tmp_path, capsys):
    """A file in the way of a folder."""
    (tmp_path / "file").write_text("")
    assert main(["prefetch", str(tmp_path / "app.yaml"), "--link", "/x"]) == 2
    assert "--this-node" in capsys.readouterr().err
    assert call("--this-node", "--link", str(tmp_path / "file" / "model"))[0] == 2
