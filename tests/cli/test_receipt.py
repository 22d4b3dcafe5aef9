"""The receipt command: its table, its JSON, its exit codes; the cluster is in tests/integration."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml

from serve_app.access.receipt import NodeReceipt, Receipt
from serve_app.cli import receipt
from serve_app.cli.main import main
from serve_app.config import AppConfig, ModelConfig
from serve_app.serve_config import ServedApp
from tests.conftest import TINY_REPO

APP = ServedApp("llm", AppConfig(model=ModelConfig(repo_id="acme/tiny")), {})
COMMIT = "ab" * 20
PROOF = Receipt(
    repo_id="acme/tiny",
    revision="main",
    commit=COMMIT,
    endpoint="https://hub.example",
    token_source="env:HF_TOKEN",
    fingerprint="0123abcd",
    account="alice",
    first_granted_at=1_000_000_000.0,
    granted_at=1_000_000_100.0,
    license_sha256="ef" * 32,
)
GOOD = NodeReceipt("id-a", "a", PROOF)
BARE = NodeReceipt("id-b", "b", None, "nothing proven yet")


@pytest.mark.parametrize(("nodes", "code"), [([GOOD], 0), ([GOOD, BARE], 4), ([BARE], 4), ([], 4)])
def test_receipt_exits_0_only_if_every_node_has_one(capsys, nodes, code):
    """No node at all is not success."""
    assert receipt.run([APP], lambda _app: nodes) == code
    assert f"proven on {nodes.count(GOOD)} of {len(nodes)} node" in capsys.readouterr().out


def test_receipt_exits_as_the_worst_application_decides():
    """One complete application does not hide another one."""
    answers = iter([[BARE], [GOOD]])
    assert receipt.run([APP, APP], lambda _app: next(answers)) == 4


def test_receipt_table_answers_an_auditor(capsys):
    """Commit, license, token, account and dates of each node; why another has none."""
    receipt.run([APP], lambda _app: [GOOD, BARE])
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("  a "))
    assert row.split() == [
        "a",
        COMMIT[:12],
        "ef" * 8,
        "env:HF_TOKEN",
        "0123abcd",
        "alice",
        "2001-09-09T01:46:40Z",
        "2001-09-09T01:48:20Z",
    ]
    assert "No receipt on b: nothing proven yet" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_receipt_json_is_one_object_with_the_whole_proof(capsys):
    """For scripts, with full hashes."""
    receipt.run([APP], lambda _app: [GOOD, BARE], as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    shown = json.loads(line)
    assert (shown["repo_id"], shown["revision"], shown["complete"]) == ("acme/tiny", "main", False)
    assert [node["receipt"] is None for node in shown["nodes"]] == [False, True]
    assert shown["nodes"][0]["receipt"] == {
        "repo_id": "acme/tiny",
        "commit": COMMIT,
        "endpoint": "https://hub.example",
        "license_sha256": "ef" * 32,
        "license": None,
        "mirror": None,
        "digest": None,
        "token": {
            "source": "env:HF_TOKEN",
            "fingerprint": "0123abcd",
            "account": "alice",
            "identity": None,
        },
        "first_proven_at": "2001-09-09T01:46:40Z",
        "last_proven_at": "2001-09-09T01:48:20Z",
    }


@pytest.fixture
def written(hub, tmp_path):
    """A config whose token lies in a file."""
    (tmp_path / "token").write_text(hub.issue_token(account="alice"))
    args = {
        "model": {"repo_id": TINY_REPO},
        "access": {"endpoint": hub.url, "token_file": str(tmp_path / "token")},
    }
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    return str(path)


def test_receipt_shows_what_a_check_leaves(hub, written, tmp_path, monkeypatch, capsys):
    """Before the check there is nothing; after it the proof; another token has its own."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert main(["receipt", written, "--this-node"]) == 4
    assert "nothing proven yet for main with the token in use" in capsys.readouterr().out
    assert main(["check", written, "--this-node"]) == 0
    capsys.readouterr()
    hub.clear_log()
    assert main(["receipt", written, "--this-node", "--json"]) == 0
    (node,) = json.loads(capsys.readouterr().out)["nodes"]
    assert node["receipt"]["commit"] == hub.commits()[TINY_REPO]["main"]
    assert node["receipt"]["license_sha256"] is None
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", node["receipt"]["first_proven_at"])
    assert hub.log == []
    (tmp_path / "token").write_text(hub.issue_token())
    assert main(["receipt", written, "--this-node"]) == 4
    assert "; 1 of other tokens, revisions or Hubs" in capsys.readouterr().out


def test_receipt_names_a_broken_token(written, tmp_path, capsys):
    """Without a token it is unknown whose receipt counts."""
    (tmp_path / "token").write_text("'quoted'")
    assert main(["receipt", written, "--this-node"]) == 4
    assert "quotes" in capsys.readouterr().out


def test_receipt_of_a_local_directory_is_none(capsys, tmp_path):
    """Nobody's license is involved that the Hub could know of."""
    app = {"import_path": "serve_app.app:build_app", "args": {"model": {"path": str(tmp_path)}}}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    assert main(["receipt", str(path), "--this-node"]) == 4
    assert "a local directory (model.path) needs no receipt" in capsys.readouterr().out


def test_receipt_without_a_cluster_looks_at_this_machine_and_says_so(written, tmp_path):
    """As a person runs it."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [Path(sys.executable).parent / "serve-app", "receipt", written],
        env=environment | {"RAY_TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 4, done.stderr
    assert "No Ray cluster is running: checking this machine alone." in done.stderr


SCHEMA = json.loads(
    (Path(__file__).parent.parent.parent / "configs" / "attestation.schema.json").read_text()
)


def attested(capsys, *nodes):
    code = receipt.run([APP], lambda _app: list(nodes), attest=True)
    out, err = capsys.readouterr()
    statements = [json.loads(line) for line in out.splitlines()]
    for statement in statements:
        jsonschema.Draft202012Validator(SCHEMA).validate(statement)
    return code, statements, err


def test_attest_writes_what_in_toto_tools_read(capsys):
    """One line for each node that proved something; the others are named beside them."""
    code, (statement,), err = attested(capsys, GOOD, BARE)
    assert code == 4
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "acme/tiny", "digest": {"gitCommit": COMMIT}}]
    predicate = statement["predicate"]
    assert predicate["node"] == {"id": "id-a", "name": "a"}
    assert predicate["token"]["fingerprint"] == "0123abcd"
    assert predicate["license"] == {"id": None, "textSha256": "ef" * 32}
    assert predicate["lastProvenAt"] == "2001-09-09T01:48:20Z"
    assert err == "No receipt on b: nothing proven yet\n"


def test_attest_has_the_digest_and_the_license_that_were_checked(capsys):
    """The digest names the subject for tools that compare hashes."""
    proof = replace(PROOF, digest="sha256:" + "12" * 32, license_id="llama3.2", fingerprint=None)
    code, (statement,), _ = attested(capsys, NodeReceipt("id-a", "a", proof))
    assert code == 0
    assert statement["subject"][0]["digest"] == {"gitCommit": COMMIT, "sha256": "12" * 32}
    assert statement["predicate"]["digest"] == proof.digest
    assert statement["predicate"]["license"]["id"] == "llama3.2"
