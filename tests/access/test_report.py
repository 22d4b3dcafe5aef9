"""The words for people."""

from dataclasses import replace

import pytest
import yaml
from ray.serve.scripts import ServeDeploySchemaDumper

from serve_app.access.report import ROWS
from serve_app.access.verdict import Outcome, TokenReport, Verdict
from serve_app.redaction import sanitise
from tests.access.cases import COMMIT, fake_token, granted, verdict

NODES = (
    granted("node-a"),
    verdict(
        "node-b",
        Outcome.LICENSE_NOT_ACCEPTED,
        http_status=403,
        hub_message="Access to model acme/tiny is restricted and you are not in the list. " * 3,
        url="https://hub/acme/tiny",
        token=TokenReport("env:HF_TOKEN", "89abcdef", "alice", ("two tokens",)),
    ),
    verdict("node-c", Outcome.HUB_UNREACHABLE, hub_message="no connection — naïve\tproxy "),
)


def decision(*nodes, **facts):
    return Verdict("acme/tiny", "main", COMMIT, "https://hub", 1.5, nodes, 5, **facts)


def test_report_of_a_deferral_says_that_nothing_is_proven():
    """Nobody may take it for a grant."""
    nowhere = verdict("(no node)", Outcome.PROBE_FAILED, hub_message="a replica asks for GPU 1")
    table = decision(replace(nowhere, deferred=True)).table()
    assert table.startswith("Access DEFERRED, nothing is proven: no node is there yet")
    assert "Each replica proves its own access when it starts" in table
    assert "a replica asks for GPU 1" in table
    assert "granted" not in table


def test_report_notes_what_a_receipt_granted():
    """With the reason, so that a yes of the Hub and a yes from memory are distinguished."""
    table = decision(granted("node-a", hub_message="granted by a receipt 3.0 h old")).table()
    assert table.startswith("Access granted")
    assert "Note: granted by a receipt 3.0 h old (node-a)" in table


def test_table_has_node_outcome_token_account_words_fix_and_link():
    """A tired person finds everything without opening a log."""
    table = decision(*NODES).table()
    assert table.startswith("Access BLOCKED: 2 of 3 nodes cannot read acme/tiny (main, commit ")
    for words in (
        "node-b  license_not_accepted  env:HF_TOKEN 89abcdef  alice",
        "The Hub said (403): Access to model acme/tiny is restricted",
        "Fix: do this",
        "Link: https://hub/acme/tiny",
        "Note: two tokens (node-b)",
        "Note: the nodes use 2 different tokens (node-a, node-b, node-c)",
    ):
        assert words in table


@pytest.mark.parametrize(("source", "noted"), [("s3:env", True), ("s3:iam-role", False)])
def test_report_expects_each_node_to_have_keys_of_its_role(source, noted):
    """A cloud gives every node others, and again each hour; keys that somebody set stay."""
    tokens = [TokenReport(source, mark) for mark in ("0123abcd", "89abcdef")]
    nodes = [granted(f"node-{mark}", token=token) for mark, token in enumerate(tokens)]
    assert ("2 different tokens" in decision(*nodes).table()) is noted


def test_report_in_serve_status_is_a_block():
    """YAML keeps the lines only without tabs, trailing spaces and other than ASCII."""
    table = decision(*NODES).table()
    assert table.isascii()
    assert "\t" not in table
    assert all(line == line.rstrip() for line in table.splitlines())
    dumped = yaml.dump({"message": f"Deploying:\n{table}"}, Dumper=ServeDeploySchemaDumper)
    assert dumped.startswith("message: |-\n")


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        (
            (granted("a"),),
            "Access granted: acme/tiny (main, commit c0ffee000000) can be read on 1 n",
        ),
        ((verdict("a", Outcome.HUB_UNREACHABLE),), "Access NOT PROVEN: 1 of 1 node cannot read"),
        ((granted("a"), granted("b", "d" * 40)), "Access NOT PROVEN: the nodes disagree"),
    ],
)
def test_report_begins_with_the_decision(nodes, words):
    """Yes, no and don't know read differently."""
    assert decision(*nodes).table().startswith(words)


def test_report_explains_the_same_problem_once():
    """A hundred nodes with one cause give one paragraph, and all refused nodes a row."""
    refused = [verdict(f"bad-{i}", Outcome.NO_TOKEN, http_status=401) for i in range(100)]
    table = decision(*(granted(f"good-{i}") for i in range(900)), *refused).table()
    assert table.count("Fix: ") == 1
    assert "no_token on bad-0, bad-1" in table
    assert "and 92 more" in table
    assert "and 900 more nodes, all granted" in table
    assert sum("  no_token" in line for line in table.splitlines()) == 100 > ROWS


def test_line_says_all_in_one_line():
    """The replica's error is this line."""
    line = NODES[1].line()
    assert "\n" not in line
    for words in ("node-b", "license_not_accepted", "89abcdef", "(403)", "do this", "https://hub"):
        assert words in line


def test_sanitise_makes_foreign_words_safe():
    """No control characters, no secret, no novel; also a secret that control characters split."""
    token = fake_token()
    dirty = f"a\x1b[31m\n\tb {token} c {token[:9]}\u200b{token[9:]} " + "x" * 999
    clean = sanitise(dirty)
    assert clean.startswith("a[31m b [secret] c [secret] ")
    assert len(clean) <= 400
    assert token not in clean.replace(" ", "")
    assert clean.isprintable()


def test_html_says_the_same_with_every_value_escaped():
    """For a notebook: what the Hub said may be anything; links can be clicked."""
    said = "<script>alert(1)</script>"
    node = verdict("<b>", Outcome.LICENSE_NOT_ACCEPTED, hub_message=said, url="https://hub/acme")
    page = decision(granted("node-a"), node)._repr_html_()
    assert "<script>" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page
    assert '<a href="https://hub/acme"' in page
    assert "<td>node-a</td><td>granted</td>" in page
    odd = decision(verdict("n", Outcome.LICENSE_NOT_ACCEPTED, url="javascript:alert(1)"))
    assert "href" not in odd._repr_html_()
