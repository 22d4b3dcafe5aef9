"""`serve-app check` as a person runs it: each outcome, its exit code and its words."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.cli.main import main
from tests.access.cases import fake_token, sharded_files
from tests.conftest import TINY_REPO, tiny_files
from tests.integration.conftest import LogicalNode, cluster_of

pytestmark = pytest.mark.slow

SERVE_APP = Path(sys.executable).parent / "serve-app"
LICENSE_LINK = "Link: {hub.url}/" + TINY_REPO

# behaviour of the Hub: outcome, exit code, words that a person needs
CASES = {
    Behaviour.granted: ("granted", 0, "Access granted"),
    Behaviour.never_asked: ("license_not_accepted", 3, LICENSE_LINK),
    Behaviour.pending: ("request_pending", 3, "awaiting a review"),
    Behaviour.rejected: ("request_rejected", 3, "has been rejected"),
    Behaviour.reset: ("request_reset", 3, LICENSE_LINK),
    Behaviour.invalid: ("invalid_token", 3, "settings/tokens"),
    Behaviour.expired: ("expired_token", 3, "is expired"),
    Behaviour.fine_grained: ("token_scope", 3, "fine-grained token settings"),
    Behaviour.org_policy_denied: ("org_policy", 3, "organization token policy"),
    Behaviour.country_blocked: ("content_blocked", 3, "(403)"),
    Behaviour.disabled: ("repo_disabled", 3, "Access to this resource is disabled."),
    Behaviour.cdn_denied: ("weights_unreachable", 3, "not the bytes of"),
    Behaviour.cdn_down: ("weights_unreachable", 3, "127.0.0.1"),
    Behaviour.rate_limited: ("rate_limited", 4, "rate limit"),
    Behaviour.server_error: ("hub_unreachable", 4, "(50"),
    Behaviour.hang: ("hub_unreachable", 4, "within"),
    Behaviour.flaky: ("granted", 0, "Access granted"),
}


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Nobody's cluster is asked by accident."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def write(tmp_path, hub, token, **model):
    """Write a Serve config whose token lies in a file."""
    (tmp_path / "token").write_text(token)
    args = {
        "model": {"repo_id": TINY_REPO, **model},
        "access": {
            "endpoint": hub.url,
            "token_file": str(tmp_path / "token"),
            "timeout_s": 1,
            "deadline_s": 6,
        },
    }
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    return str(path)


@pytest.mark.parametrize("behaviour", CASES, ids=lambda behaviour: behaviour.value)
def test_check_gives_each_answer_of_the_hub_its_outcome_exit_code_and_words(
    hub, tmp_path, capsys, behaviour
):
    """The table names the outcome, the token's file and fingerprint, and the way out."""
    token = hub.issue_token(behaviour)
    config = write(tmp_path, hub, token)
    outcome, code, words = CASES[behaviour]
    began = time.monotonic()
    assert main(["check", config, "--this-node"]) == code
    assert time.monotonic() - began < 8
    out, err = capsys.readouterr()
    assert outcome in out
    assert words.format(hub=hub) in " ".join(out.split())
    assert re.search(rf"file:{tmp_path}/token [0-9a-f]{{8}}", out)
    assert token not in out + err
    assert "Traceback" not in out + err
    assert sum(entry.bytes_sent for entry in hub.log if entry.status == 206) <= 9
    assert not any(entry.origin == "cdn" and entry.status == 200 for entry in hub.log)


@pytest.mark.parametrize(
    ("content", "outcome", "words"),
    [
        ("", "malformed_token", "is empty"),
        ("None", "malformed_token", "nothing was filled in"),
        ('"{token}"', "malformed_token", "quotes"),
        ("{token}\n{token}", "malformed_token", "more than one line"),
        ("Bearer {token}", "malformed_token", "only the token itself"),
        ("{token}\n", "invalid_token", "settings/tokens"),
    ],
)
def test_check_reports_a_tokens_shape_before_any_request(
    hub, tmp_path, capsys, content, outcome, words
):
    """Whoever filled the secret learns what is wrong with it; the Hub is not even asked."""
    token = fake_token()
    config = write(tmp_path, hub, content.format(token=token))
    assert main(["check", config, "--this-node"]) == 3
    out = " ".join(capsys.readouterr().out.split())
    assert outcome in out
    assert words in out
    assert token not in out
    assert bool(hub.log) == (outcome == "invalid_token")


def test_check_names_a_token_file_that_is_a_directory(hub, tmp_path, capsys):
    """A secret mounted as a folder is named as such."""
    config = write(tmp_path, hub, "x")
    (tmp_path / "token").unlink()
    (tmp_path / "token").mkdir()
    assert main(["check", config, "--this-node"]) == 3
    assert "is a directory" in " ".join(capsys.readouterr().out.split())  # wherever it is wrapped


@pytest.mark.parametrize(
    ("model", "outcome"),
    [({"repo_id": "acme/none"}, "repo_not_found"), ({"revision": "v9"}, "revision_not_found")],
)
def test_check_distinguishes_a_wrong_name_from_a_missing_grant(
    hub, tmp_path, capsys, model, outcome
):
    """Wrong repository and wrong revision are distinguished from a missing grant."""
    config = write(tmp_path, hub, hub.issue_token(Behaviour.granted), **model)
    assert main(["check", config, "--this-node"]) == 3
    assert outcome in capsys.readouterr().out


def test_check_blocks_an_incomplete_repository(tmp_path, capsys):
    """A shard that the index names and nobody uploaded is found before the rollout."""
    files = sharded_files(missing="model-00002-of-00002.safetensors")
    with LocalHub([Repo(TINY_REPO, files)]) as hub:
        config = write(tmp_path, hub, hub.issue_token(Behaviour.granted))
        assert main(["check", config, "--this-node"]) == 3
    out = capsys.readouterr().out
    assert "weights_missing" in out
    assert "model-00002-of-00002.safetensors" in out


def test_check_exits_4_for_a_hub_that_is_down(hub, tmp_path, capsys):
    """Exit 4: nobody said no."""
    config = write(tmp_path, hub, hub.issue_token(Behaviour.granted))
    hub.stop()
    assert main(["check", config, "--this-node"]) == 4
    assert "hub_unreachable" in capsys.readouterr().out


def run(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "HF_ENDPOINT"}
    return subprocess.run(
        [SERVE_APP, "check", *arguments],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("behaviour", [Behaviour.granted, Behaviour.never_asked, Behaviour.invalid])
def test_check_over_https_with_an_own_authority(tmp_path, certificates, behaviour):
    """A company's own certificate authority works, and one that is unknown is not trusted."""
    outcome, code, _ = CASES[behaviour]
    with LocalHub([Repo(TINY_REPO, tiny_files())], tls=certificates.server) as hub:
        config = write(tmp_path, hub, hub.issue_token(behaviour))
        trusted = run(config, "--json", "--this-node", SSL_CERT_FILE=str(certificates.authority))
        unknown = run(config, "--json", "--this-node")
    assert trusted.returncode == code, trusted.stdout + trusted.stderr
    assert [node["outcome"] for node in json.loads(trusted.stdout)["nodes"]] == [outcome]
    assert unknown.returncode == 4
    assert json.loads(unknown.stdout)["nodes"][0]["outcome"] == "hub_unreachable"


def test_check_without_a_cluster_is_of_this_machine_and_says_so(hub, tmp_path):
    """The first check of a newcomer, before any Ray runs."""
    done = run(write(tmp_path, hub, hub.issue_token(Behaviour.granted)), RAY_TMPDIR=str(tmp_path))
    assert done.returncode == 0
    assert "No Ray cluster is running: checking this machine alone." in done.stderr
    assert "Access granted" in done.stdout


@pytest.mark.cluster
def test_check_asks_every_node_of_a_cluster(hub, tmp_path):
    """One JSON object with a row for each node, JUnit beside it, exit 3 for the red one."""
    token = hub.issue_token(Behaviour.granted, account="alice")
    args = {"model": {"repo_id": TINY_REPO}, "access": {"endpoint": hub.url}}
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"applications": [app]}))
    report = tmp_path / "junit.xml"
    with cluster_of(LogicalNode("good", token), LogicalNode("bare")) as running:
        done = run(str(config), "--json", "--junit", str(report), "--address", running.address)
    assert done.returncode == 3, done.stderr
    verdict = json.loads(done.stdout)
    assert {node["node_name"]: node["outcome"] for node in verdict["nodes"]} == {
        "good": "granted",
        "bare": "no_token",
    }
    assert verdict["commit"] == hub.commits()[TINY_REPO]["main"]
    assert 'failures="1"' in report.read_text()
    assert token not in done.stdout + done.stderr + report.read_text()
