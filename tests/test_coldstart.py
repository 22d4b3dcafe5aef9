"""The `coldstart` command on its way to a cluster; what it prints is in `test_ledger.py`."""

import json

import pytest

from serve_app import coldstart
from serve_app.__main__ import main
from serve_app.ledger import Span, Start

START = Start("llm", "abc", "node-a", (Span("check", 100.0, 1.0),), 1.0, {"hub": 1})


@pytest.fixture
def starts(monkeypatch):
    """What the cluster remembers."""
    known = []
    monkeypatch.setattr(coldstart.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(coldstart.ledger, "recent", lambda: known)
    return known


def test_without_a_cluster_it_says_how_to_name_one(monkeypatch, capsys):
    """A config error, exit 2."""
    monkeypatch.setattr(coldstart, "find_cluster", lambda address: None)
    assert main(["coldstart"]) == 2
    assert "--address" in capsys.readouterr().err


def test_a_cluster_without_a_start_is_no_success(starts, capsys):
    """Scripts see that there is nothing to read."""
    assert main(["coldstart"]) == 4
    assert "No replica has started" in capsys.readouterr().err


def test_every_start_is_shown(starts, capsys):
    """For people as a waterfall, for machines as one object a line."""
    starts += [START, START]
    assert main(["coldstart"]) == 0
    assert capsys.readouterr().out.count("llm abc on node-a: 1.0 s") == 2
    assert main(["coldstart", "--json"]) == 0
    first, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["spans"] == [{"phase": "check", "at_s": 0.0, "duration_s": 1.0}]
    assert first["weights_bytes"] == {"hub": 1}
