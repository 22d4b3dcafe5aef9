"""What going back is about, before anything is touched."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from serve_app.access.verdict import NodeVerdict, Outcome, Verdict
from serve_app.cli import deploy, main
from serve_app.config import parse_args
from serve_app.errors import ConfigError
from serve_app.rollout import history
from serve_app.rollout.deploy import Result
from serve_app.rollout.scope import scope_of
from serve_app.rollout.serve_client import AppState
from serve_app.serve_config import IMPORT_PATH, ServedApp, served
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import Entry, What


def app(name, version):
    return {"name": name, "import_path": "x:y", "args": {"version": version}}


def version(name, config, number, commit=None):
    """Return the entry of a rollout that served well."""
    return Entry(
        application=name,
        what=What.DONE,
        why="it runs",
        who="me",
        number=number,
        rollout=number,
        at=float(number),
        config=config,
        config_commit=commit,
    )


@pytest.fixture
def cluster(monkeypatch):
    """A cluster's memory, and what serves there."""
    there = SimpleNamespace(versions=[], serving={}, asked=0)

    def instance(_goal):
        there.asked += 1
        return SimpleNamespace(goal=lambda: {"applications": list(there.serving.values())})

    def read():
        names = sorted({entry.application for entry in there.versions})
        return {n: [e for e in there.versions if e.application == n] for n in names}

    monkeypatch.setattr(history, "read", read)
    monkeypatch.setattr(deploy, "Instance", instance)
    return there


def test_former_starts_nothing_without_a_memory(cluster):
    """Asking Serve would start it on a cluster that has none."""
    with pytest.raises(ConfigError, match=r"^no earlier config that served is remembered"):
        deploy.former(None)
    with pytest.raises(ConfigError, match="no earlier config of a that served"):
        deploy.former("a")
    assert cluster.asked == 0


def test_former_names_the_applications_that_may_have_one(cluster):
    """Nobody else's is gone back with by guess."""
    cluster.versions = [version("a", app("a", 1), 1), version("b", app("b", 1), 2)]
    cluster.serving = {name: app(name, 1) for name in "ab"}
    with pytest.raises(ConfigError, match=r"of b that .* `serve-app rollback APP` .*: a$"):
        deploy.former(None)


def test_former_asks_the_gate_for_what_goes_back_alone(cluster):
    """What others serve needs no grant of whoever goes back."""
    cluster.versions = [
        version("a", app("a", 1), 1),
        version("b", app("b", 1), 2),
        version("b", app("b", 2), 3),
    ]
    cluster.serving = {"a": app("a", 1), "b": app("b", 2)}
    good = deploy.former(None)
    assert good.applications == {"applications": [app("b", 1)]}
    assert served(good.applications) == ()  # another package's needs none of ours either


def ours(version, **model):
    source = {"repo_id": "acme/tiny", **model}
    args = {"model": source, "access": {"endpoint": "http://hub"}, "api": {"max": version}}
    return {"name": "a", "import_path": IMPORT_PATH, "args": args}


@pytest.mark.parametrize(
    ("commit", "revision", "goes_back_to"),
    [
        ("new", "main", "old"),  # the branch moved: the same config would load the new commit
        ("old", "main", None),  # it did not: another revision would replace what runs
        ("new", "v1", None),  # nothing is known of another branch
    ],
)
def test_good_version_does_not_follow_a_branch_that_moved(cluster, commit, revision, goes_back_to):
    """A rollout that fails because of a new commit must not go back to that commit."""
    cluster.versions = [version("a", ours(1), 1, "old")]
    scope = scope_of({"applications": [ours(2, revision=revision)]}, {"applications": [ours(1)]})
    good = deploy._good({"applications": [ours(1)]}, scope, set(), {"a": {"": commit}})
    (app,) = good["applications"]
    assert app["args"]["model"].get("revision") == goes_back_to


def test_good_version_is_the_way_back_from_one_that_fails(cluster):
    """At the commit that it served; others' applications stay, failing or not."""
    other = {"name": "b", "import_path": "x:y", "route_prefix": "/b"}
    cluster.versions = [version("a", ours(1), 1, "old"), version("b", app("b", 1), 1)]
    before = {"applications": [ours(9), other]}
    scope = scope_of({"applications": [ours(2)]}, before)
    good = deploy._good(before, scope, {"a"}, {"a": {"": "new"}})
    assert good["applications"] == [ours(1, revision="old"), other]


@pytest.mark.parametrize(
    ("resolved", "revision"), [("old", None), ("moved", "old"), (None, "old"), ("", "old")]
)
def test_former_by_hand_loads_the_commit_that_served(cluster, resolved, revision):
    """By its branch while that means it, and pinned when the branch has moved."""
    cluster.versions = [version("a", ours(1), 1, "old"), version("a", ours(2), 2, "new")]
    cluster.serving = {"a": ours(2)}
    good = deploy.former(None)
    assert good.applications == {"applications": [ours(1)]}
    good = good.at_commits({"a": Verdict("r", "main", resolved, "e", 0.1, ())})
    (app,) = good.applications["applications"]
    assert app["args"]["model"].get("revision") == revision
    assert good.moved == ({"a"} if revision else frozenset())


def test_return_does_not_pin_what_the_gate_says_nothing_of(cluster):
    """An application of others, and one whose commit nobody noted."""
    cluster.versions = [version("a", ours(1), 1), version("b", app("b", 1), 1)]
    good = deploy.Return(tuple(cluster.versions))
    verdict = Verdict("r", "main", "new", "e", 0.1, ())
    good = good.at_commits({"a": verdict})
    assert good.moved == frozenset()  # so that nothing is asked twice
    assert good.applications["applications"] == [ours(1), app("b", 1)]


@pytest.mark.parametrize("status", ["RUNNING", "DEPLOY_FAILED"])
def test_former_that_does_not_serve_any_more_gives_way(cluster, kv_store, monkeypatch, status):
    """To what served well until somebody went back; what failed already is left as it failed."""
    cluster.versions = [version("a", app("a", 1), 1)]
    cluster.serving = {"a": app("a", 2)}
    given = {}

    def instance(_goal):
        states = {"a": AppState(status, "", 1.0), "b": AppState("DEPLOY_FAILED", "", 1.0)}
        goal = {"applications": list(cluster.serving.values())}
        return SimpleNamespace(goal=lambda: goal, states=lambda: states)

    def rolled_out(_serving, _goal, *, former, **_):
        given["former"] = former
        return Result("failed", "nonsense", 1.0)

    monkeypatch.setattr(deploy, "Instance", instance)
    monkeypatch.setattr(deploy, "deploy", rolled_out)
    monkeypatch.setattr(deploy, "rollout_lock", nullcontext)
    good = deploy.former("a")
    assert deploy.roll_back(good, deploy.Options(1.0)) == 5
    (entry,) = rollout_history.entries("a")
    assert (entry.what, entry.why) == (What.FAILED, "nonsense")
    served = {"applications": [app("a", 2)]}
    assert given["former"] == (served if status == "RUNNING" else None)


def test_blocked_rollout_is_recorded(kv_store):
    """With the first line of the table; an application that passed has no entry."""
    args = {"model": {"repo_id": "acme/tiny"}}
    apps = [ServedApp(name, parse_args(args), {}) for name in "ab"]
    node = NodeVerdict("id", "n1", Outcome.NO_TOKEN, "fix")
    red = Verdict("acme/tiny", "main", None, "http://hub", 0.5, (node,))
    yes = NodeVerdict("id", "n1", Outcome.GRANTED, "fix", commit="c" * 40)
    green = Verdict("acme/tiny", "main", "c" * 40, "http://hub", 0.5, (yes,))
    assert deploy.blocked(3, apps, {"a": red, "b": green}) == 3
    (entry,) = rollout_history.entries("a")
    assert (entry.what, entry.duration_s, entry.commit) == (What.BLOCKED, 0.5, None)
    assert entry.why == "Access BLOCKED: 1 of 1 node cannot read acme/tiny (main)."
    assert entry.who == rollout_history.whoami()
    assert rollout_history.entries("b") == []


@pytest.mark.parametrize("is_terminal", [False, True])
def test_rollout_options_give_a_script_each_entry_as_a_line(
    kv_store, monkeypatch, capsys, is_terminal
):
    """On stderr; a person at a terminal has read how it ended already."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    given = SimpleNamespace(timeout="1m", json=False, dry_run=False, remove=[])
    assert main._rollout_options(given).timeout_s == 60
    rollout_history.record(version("a", app("a", 1), 1))
    lines = capsys.readouterr().err.splitlines()
    if is_terminal:
        assert lines == []
    else:
        (line,) = map(json.loads, lines)
        assert (line["event"], line["what"], line["who"]) == ("history.recorded", "done", "me")


def test_run_prints_no_token_that_serves_already(kv_store, monkeypatch, capsys):
    """A file with one is refused; what came by `serve deploy` was never looked at."""
    token = "hf_" + "a" * 34
    app = {"name": "llm", "import_path": IMPORT_PATH, "args": {}}
    held = app | {"args": {"access": {"token": f"{'x' * 50}\n{token}"}}}

    class Serving:
        def __init__(self, goal):
            pass

        @staticmethod
        def goal():
            return {"applications": [held]}

    monkeypatch.setattr(deploy, "Instance", Serving)
    options = deploy.Options(timeout_s=1.0, dry_run=True)
    assert deploy.run({"applications": [app]}, (), {}, options) == 0
    output = capsys.readouterr().err
    assert "llm: args.access.token:" in output
    assert token[:10] not in output
