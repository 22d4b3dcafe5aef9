"""The check command's own work: waiting, exit codes, JSON, JUnit."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import yaml

from scripts.local_hub.exchange import Publisher, identity_token
from serve_app.access.verdict import NodeVerdict, Outcome, TokenReport, Verdict
from serve_app.cli import check
from serve_app.cli.main import main
from serve_app.config import AppConfig, ModelConfig
from serve_app.serve_config import ServedApp
from tests.conftest import TINY_REPO

COMMIT = "a" * 40
APP = ServedApp("llm", AppConfig(model=ModelConfig(repo_id="acme/tiny")), {})


def verdict(*outcomes):
    nodes = tuple(
        NodeVerdict(
            f"id{i}",
            f"node-{i}",
            outcome,
            "fix <it> & go",
            token=TokenReport("none"),
            commit=COMMIT,
        )
        for i, outcome in enumerate(outcomes)
    )
    return Verdict("acme/tiny", "main", COMMIT, "https://hub", 0.5, nodes)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1h", 3600), ("30m", 1800), ("90s", 90), ("90", 90), ("1h30m", 5400), ("0", 0)],
)
def test_parse_duration_takes_hours_minutes_and_seconds(text, seconds):
    """Hours, minutes and seconds, alone or together."""
    assert check.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "1d", "-1", "1.5h", "soon"])
def test_parse_duration_refuses_others(text):
    """The message shows how to write one."""
    with pytest.raises(ValueError, match="write it as 1h"):
        check.parse_duration(text)


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([verdict(Outcome.GRANTED)], 0),
        ([verdict(Outcome.GRANTED), verdict(Outcome.HUB_UNREACHABLE)], 4),
        ([verdict(Outcome.HUB_UNREACHABLE), verdict(Outcome.NO_TOKEN)], 3),
        ([verdict()], 4),
    ],
)
def test_check_exits_as_the_worst_application_decides(capsys, verdicts, code):
    """Blocked is worse than unknown, unknown is worse than granted."""
    answers = iter(verdicts)
    assert check.run([APP] * len(verdicts), lambda app: next(answers), check.Output()) == code
    assert capsys.readouterr().out.count("acme/tiny") >= len(verdicts)


def test_check_waits_until_the_request_is_decided(capsys, monkeypatch):
    """A pending request is asked for again; a decision, either way, ends the wait."""
    monkeypatch.setattr(check, "POLL_S", 0.01)
    answers = iter([verdict(Outcome.REQUEST_PENDING)] * 2 + [verdict(Outcome.GRANTED)])
    assert check.run([APP], lambda app: next(answers), check.Output(), wait_s=60) == 0
    out, err = capsys.readouterr()
    assert err.count("under review on 1 of 1 nodes") == 2
    assert "granted" in out


def test_check_waits_no_longer_than_its_limit(monkeypatch):
    """A request that stays pending is a refusal in the end."""
    monkeypatch.setattr(check, "POLL_S", 0.01)
    calls = []
    gate = lambda app: calls.append(app) or verdict(Outcome.REQUEST_PENDING)  # noqa: E731
    assert check.run([APP], gate, check.Output(), wait_s=0.05) == 3
    assert len(calls) >= 2


def test_check_does_not_wait_for_a_refusal():
    """Only a request under review is worth waiting for."""
    calls = []
    gate = lambda app: calls.append(app) or verdict(Outcome.NO_TOKEN)  # noqa: E731
    assert check.run([APP], gate, check.Output(), wait_s=60) == 3
    assert len(calls) == 1


def test_check_prints_one_json_object_per_application(capsys):
    """Machines read the public keys, and nothing else is on stdout."""
    check.run([APP], lambda app: verdict(Outcome.GRANTED), check.Output(as_json=True))
    (line,) = capsys.readouterr().out.splitlines()
    shown = json.loads(line)
    assert set(shown) == {
        "approved",
        "repo_id",
        "revision",
        "commit",
        "endpoint",
        "duration_s",
        "hub_requests",
        "nodes",
    }
    assert set(shown["nodes"][0]) == {
        "node_id",
        "node_name",
        "outcome",
        "http_status",
        "hub_message",
        "remedy",
        "url",
        "token",
        "license",
        "digest",
        "mirror",
    }


def test_check_writes_a_junit_case_for_each_node(tmp_path):
    """CI systems show each node; texts are escaped."""
    path = tmp_path / "j.xml"
    gate = lambda app: verdict(Outcome.GRANTED, Outcome.NO_TOKEN)  # noqa: E731
    check.run([APP], gate, check.Output(junit=path))
    (suite,) = ElementTree.parse(path).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("2", "1")
    assert [len(case) for case in suite] == [0, 1]
    assert suite[1][0].get("message") == "fix <it> & go"


def test_check_writes_a_deferred_place_as_skipped_in_junit(tmp_path):
    """It neither failed nor passed."""
    path = tmp_path / "j.xml"
    nowhere = replace(verdict(Outcome.PROBE_FAILED).nodes[0], deferred=True)
    decision = replace(verdict(), nodes=(nowhere,))
    assert check.run([APP], lambda app: decision, check.Output(junit=path)) == 0
    (suite,) = ElementTree.parse(path).getroot()
    assert suite.get("failures") == "0"
    assert [child.tag for child in suite[0]] == ["skipped"]


def test_check_writes_a_failure_in_junit_without_nodes(tmp_path):
    """Nothing checked must not look like success."""
    path = tmp_path / "j.xml"
    check.run([APP], lambda app: verdict(), check.Output(junit=path))
    (suite,) = ElementTree.parse(path).getroot()
    assert suite.get("failures") == "1"


def test_check_of_no_application_of_ours_has_nothing_to_prove():
    """Such as going back with somebody else's; nothing was refused and nothing is unknown."""
    assert check.run([], lambda _app: None, check.Output(as_json=False)) == 0


@pytest.mark.parametrize(
    "case",
    [
        ({}, {"license": {"allow": ["mit"]}}, "license_not_allowed", "states no license"),
        ({"digest": "sha256:" + "0" * 64}, {}, "digest_mismatch", "model.digest is sha256:000"),
        ({}, {"identity": True}, "identity_refused", "sub somebody"),
    ],
)
def test_check_exits_3_for_what_the_config_refuses(hub, tmp_path, capsys, case):
    """The whole command on this machine: a license, a digest, an identity."""
    model, access, outcome, words = case
    identity, token = tmp_path / "identity", tmp_path / "token"
    identity.write_text(identity_token("https://oidc.example", "somebody"))
    hub.publishers.trust("alice", Publisher("https://oidc.example", "somebody else"))
    token.write_text(hub.issue_token())
    if access.get("identity"):
        access = {"identity": {"token_file": str(identity), "resource": "user/alice"}}
    else:
        access = {**access, "token_file": str(token)}
    args = {
        "model": {"repo_id": TINY_REPO, **model},
        "access": {"endpoint": hub.url, **access},
        "replica": {"num_gpus": 0},
    }
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    config = tmp_path / "app.yaml"
    config.write_text(yaml.safe_dump({"applications": [app]}))
    assert main(["check", str(config), "--this-node"]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert f" {outcome} " in said
    assert words in said
    assert identity.read_text() not in said
    assert main(["check", str(config), "--this-node", "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["nodes"][0]["outcome"] == outcome
