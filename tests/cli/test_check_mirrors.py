"""`serve-app check` where a mirror answers in the Hub's place, over http and https."""

import json
from functools import partial

import pytest
import yaml
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from scripts.local_hub.behaviours import Route
from scripts.local_hub.mirrors import Mirror, artifactory, nexus
from serve_app.access import receipt as receipts
from serve_app.cli.main import main
from serve_app.config import parse_args
from serve_app.weights.fetch import fetch
from tests.access.cases import sharded_files
from tests.conftest import TINY_REPO, safetensors

DIALECTS = {
    "Artifactory": artifactory,
    "Nexus": nexus,
    "a mirror": Mirror,
    "a mirror with redirects": partial(Mirror, redirects=True),
    "Artifactory with headers": partial(artifactory, loses=(), redirects=True),
}
WITHOUT_HASHES = {
    "lacks": frozenset(Route) - {Route.info, Route.resolve},
    "states_hashes": False,
}
# token of the node, gaps of the mirror -> outcome, exit code, what was found, what to do
BLOCKED = {
    "no-token": (None, {}, "no_token", 3, "Bad credentials", "not of the Hub"),
    "unknown-token": ("other", {}, "invalid_token", 3, "Bad credentials", "not the Hub"),
    "refused-account": ("mine", {}, "content_blocked", 3, "said (403)", "ask whoever runs it"),
    "no-hashes": ("mine", WITHOUT_HASHES, "unknown", 4, "no list of files", "missing above"),
    "other-bytes": (
        "mine",
        {"others": {"config.json": b"{}"}},
        "unknown",
        4,
        "config.json came with other bytes than are listed",
        "missing above",
    ),
    "other-size": (
        "mine",
        {"others": {"model-00001-of-00002.safetensors": safetensors({"w0": [9]})}},
        "unknown",
        4,
        "no X-Repo-Commit, and model-00001-of-00002.safetensors came with",
        "missing above",
    ),
}


@pytest.fixture(params=["http", "https"])
def mirrored(request, certificates, monkeypatch, tmp_path):
    tls = certificates.server if request.param == "https" else None
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with LocalHub([Repo(TINY_REPO, sharded_files(), xet=True)], tls=tls) as hub:
        yield hub


def arguments(hub, tmp_path, token):
    access = {"endpoint": hub.url}
    if token is not None:
        (tmp_path / "token").write_text(token)
        access["token_file"] = str(tmp_path / "token")
    return {"model": {"repo_id": TINY_REPO}, "access": access, "replica": {"num_gpus": 0}}


def check(tmp_path, args, capsys, *options):
    """Return exit code, table as one line, and the object of --json."""
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    config = tmp_path / "app.yaml"
    config.write_text(yaml.safe_dump({"applications": [app]}))
    code = main(["check", str(config), "--this-node"])
    table = " ".join(capsys.readouterr().out.split())
    assert main(["check", str(config), "--this-node", "--json"]) == code
    return code, table, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_check_mirror_granted(mirrored, tmp_path, capsys, dialect):
    """The table and the receipt say whose yes it is; five requests at most, and all is fetched."""
    mirrored.answer_as(DIALECTS[dialect](mirrored.issue_token(), tokens=["mine"]))
    args = arguments(mirrored, tmp_path, "mine")
    code, table, shown = check(tmp_path, args, capsys)
    name = dialect.partition(" with ")[0]
    assert code == 0
    assert f"Note: granted by {name} in the Hub's place" in table
    assert shown["nodes"][0]["mirror"] == name
    assert shown["hub_requests"] <= 5
    assert shown["commit"] == mirrored.commits()[TINY_REPO]["main"]
    config = parse_args(args)
    assert fetch(config.model, config.access, shown["commit"]).hub_bytes > 0
    assert [each.mirror for each in receipts.stored(TINY_REPO)] == [name]
    assert not any(entry.authorization_leaked for entry in mirrored.log)


@pytest.mark.parametrize("case", BLOCKED)
@pytest.mark.parametrize("kind", [artifactory, nexus], ids=["artifactory", "nexus"])
def test_check_mirror_blocked(mirrored, tmp_path, capsys, kind, case):
    """What it refuses, and what it cannot prove; the remedy is about the mirror."""
    token, gaps, outcome, code, words, remedy = BLOCKED[case]
    behaviour = Behaviour.never_asked if case == "refused-account" else Behaviour.granted
    mirrored.answer_as(kind(mirrored.issue_token(behaviour), tokens=["mine"], **gaps))
    found, table, shown = check(tmp_path, arguments(mirrored, tmp_path, token), capsys)
    assert (found, shown["nodes"][0]["outcome"]) == (code, outcome)
    assert words in table
    assert remedy in table.partition("Fix: ")[2]
    assert "Link: " not in table


def test_check_mirror_passes_on_the_hub(mirrored, tmp_path, capsys):
    """With every header of the Hub it is the Hub, as far as anybody can see."""
    mirrored.answer_as(Mirror(mirrored.issue_token(), loses=(), redirects=True))
    code, table, shown = check(tmp_path, arguments(mirrored, tmp_path, None), capsys)
    assert (code, shown["nodes"][0]["mirror"]) == (0, None)
    assert "in the Hub's place" not in table
