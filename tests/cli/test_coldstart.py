"""The `coldstart` command on its way to a cluster; and what it prints."""

import json
from dataclasses import replace

import pytest

from serve_app.cli.main import main
from serve_app.cluster import connection
from serve_app.telemetry import cold_start
from serve_app.telemetry.cold_start import Span, Start

START = Start("llm", "abc", "node-a", (Span("check", 100.0, 1.0),), 1.0, {"hub": 1})


@pytest.fixture
def starts(monkeypatch):
    """What the cluster remembers."""
    known = []
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(cold_start, "recent", lambda: known)
    return known


def test_coldstart_without_a_cluster_says_how_to_name_one(monkeypatch, capsys):
    """A config error, exit 2."""
    monkeypatch.setattr(connection, "find_cluster", lambda address: None)
    assert main(["coldstart"]) == 2
    assert "--address" in capsys.readouterr().err


def test_coldstart_without_a_start_is_no_success(starts, capsys):
    """Scripts see that there is nothing to read."""
    assert main(["coldstart"]) == 4
    assert "No replica has started" in capsys.readouterr().err


def test_coldstart_shows_every_start(starts, capsys):
    """For people as a row, for machines as one object a line."""
    starts += [START, START]
    assert main(["coldstart"]) == 0
    assert capsys.readouterr().out.count("llm") == 2
    assert main(["coldstart", "--json"]) == 0
    first, _ = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["spans"] == [{"phase": "check", "at_s": 0.0, "duration_s": 1.0}]
    assert first["weights_bytes"] == {"hub": 1}


def test_coldstart_table_has_a_column_for_each_phase(starts, capsys):
    """A start that spared a phase, such as the download, shows a dash there."""
    fetched = replace(
        START,
        replica="xyz",
        spans=(Span("check", 200.0, 0.5), Span("download", 200.5, 60.0)),
        ready_s=61.25,
        weights_bytes={"hub": 1_500, "peer": 0, "cache": 7},
    )
    starts += [replace(START, weights_bytes={}), fetched]
    assert main(["coldstart"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split() == [
        *("STARTED", "APPLICATION", "REPLICA", "NODE", "WEIGHTS", "FROM", "READY"),
        *("check", "download"),
    ]
    shown = ["1970-01-01T00:01:40Z", "llm", "abc", "node-a", "-", "1.0", "1.00", "-"]
    assert first.split() == shown
    shown = ["llm", "xyz", "node-a", "hub", "1,500,", "cache", "7", "61.2", "0.50", "60.00"]
    assert second.split()[1:] == shown
