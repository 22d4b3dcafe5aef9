"""The `history` command: its table, its JSON, and what it does where nothing is recorded."""

import json
import time

import pytest

from serve_app.cli.main import main
from serve_app.cluster import connection
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry, What


@pytest.fixture
def kept(monkeypatch, kv_store):
    """A cluster's store, to which this process is connected."""
    monkeypatch.setattr(connection.ray, "is_initialized", lambda: True)
    return kv_store


@pytest.fixture
def recorded(kept, monkeypatch):
    """Two applications, at seconds 100 to 103."""
    seconds = iter(range(100, 200))
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    for name, what in (
        ("llm", What.APPROVED),
        ("other", What.DONE),
        ("llm", What.ROLLED_BACK),
        ("llm", What.ACCESS_LOST),
    ):
        rollout_history.record(
            Entry(
                application=name,
                what=what,
                why=f"because of {what}",
                who="alice on host-1",
                commit="c" * 40 if what is What.APPROVED else None,
                config_hash="0123456789ab",
                duration_s=1.25,
                config={"env": "SECRET"},
            )
        )


def test_history_table_has_a_row_for_each_entry_in_order(recorded, capsys):
    """Of all applications, by time."""
    assert main(["history"]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [
        *("WHEN", "APPLICATION", "WHAT", "SECONDS", "COMMIT", "CONFIG", "WHO", "WHY"),
    ]
    assert [row.split()[1:3] for row in rows] == [
        ["llm", "approved"],
        ["other", "done"],
        ["llm", "rolled_back"],
        ["llm", "access_lost"],
    ]
    assert rows[0].split() == [
        *("1970-01-01T00:01:40Z", "llm", "approved", "1.2", "c" * 12, "0123456789ab"),
        *("alice", "on", "host-1", "because", "of", "approved"),
    ]


def test_history_of_one_application_for_machines(recorded, capsys):
    """One object a line; a config is not shown, since its variables may hold anything."""
    assert main(["history", "llm", "--json"]) == 0
    text = capsys.readouterr().out
    first, *rest = map(json.loads, text.splitlines())
    assert first == {
        "application": "llm",
        "number": 1,
        "what": "approved",
        "why": "because of approved",
        "who": "alice on host-1",
        "commit": "c" * 40,
        "config_hash": "0123456789ab",
        "at": 100.0,
        "duration_s": 1.25,
    }
    assert [entry["what"] for entry in rest] == ["rolled_back", "access_lost"]
    assert "SECRET" not in text


@pytest.mark.parametrize("words", [[], ["nobody"], ["nobody", "--json"]])
def test_history_of_nothing_recorded_is_an_answer(kept, capsys, words):
    """Exit 0, and no line that a script could take for an entry."""
    assert main(["history", *words]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"Nothing{' of nobody' if words else ''} is recorded" in shown.err


def test_history_without_a_cluster_says_how_to_name_one(monkeypatch, capsys):
    """A config error, exit 2."""
    monkeypatch.setattr(connection, "find_cluster", lambda address: None)
    assert main(["history"]) == 2
    assert "--address" in capsys.readouterr().err


def test_history_of_a_cluster_that_does_not_answer_is_a_config_error(kept, capsys):
    """And no traceback."""
    kept.is_lost = True
    assert main(["history"]) == 2
    assert "the cluster does not give its history (RayError)" in capsys.readouterr().err
