"""The `coldstart` command on its way to a cluster; what it prints is in `test_ledger.py`."""

import json
from dataclasses import replace

import pytest

from serve_app.cli import coldstart
from serve_app.cli.main import main
from serve_app.telemetry.cold_start import Span, Start

START = Start("llm", "abc", "node-a", (Span("check", 100.0, 1.0),), 1.0, {"hub": 1})


@pytest.fixture
def starts(monkeypatch):
    """What the cluster remembers."""
    known = []
    monkeypatch.setattr(coldstart.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(coldstart.cold_start, "recent", lambda: known)
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


def test_each_start_stands_beside_what_those_before_it_foretold(starts, capsys):
    """The first has none; the second has the first's, and its own never."""
    later = replace(START, spans=(Span("check", 200.0, 3.0),), ready_s=3.0, weights_bytes={})
    starts += [replace(START, weights_bytes={}), later]
    assert main(["coldstart"]) == 0
    first, second = capsys.readouterr().out.strip().split("\n\n")
    assert "no earlier start to forecast it from" in first
    assert "forecast [1.0 s] from 1 earlier start\n" in second
    assert "3.00 s    [1.00]" in second
    assert main(["coldstart", "--json"]) == 0
    told = [json.loads(line)["forecast"] for line in capsys.readouterr().out.splitlines()]
    assert told == [None, {"ready_s": 1.0, "phases": {"check": 1.0, "download": 0.0}, "starts": 1}]


def test_a_start_that_fetched_stands_beside_those_that_fetched(starts, capsys):
    """By their rate, ten bytes a second; where none did, nothing is foretold."""

    def fetched(at, seconds, size):
        spans = (Span("download", at, seconds),)
        return replace(START, spans=spans, ready_s=seconds, weights_bytes={"peer": size})

    starts += [fetched(100.0, 1.0, 0), fetched(200.0, 60.0, 600), fetched(300.0, 9.0, 200)]
    assert main(["coldstart", "--json"]) == 0
    told = [json.loads(line)["forecast"] for line in capsys.readouterr().out.splitlines()]
    assert told == [None, None, {"ready_s": 20.0, "phases": {"download": 20.0}, "starts": 2}]
