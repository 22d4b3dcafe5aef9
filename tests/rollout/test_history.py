"""What a rollout can go back to."""

import time

import pytest

from serve_app.config import config_hash, parse_args
from serve_app.rollout import history
from serve_app.rollout.deploy import Result
from serve_app.rollout.history import Rollout
from serve_app.rollout.scope import Scope, pinned
from serve_app.serve_config import IMPORT_PATH
from serve_app.telemetry import rollout_history
from serve_app.telemetry.rollout_history import What


@pytest.fixture(autouse=True)
def store(monkeypatch, kv_store):
    """Keep the cluster's memory in a dictionary, and let every rollout have its own second."""
    seconds = iter(range(1, 1000))
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))
    return kv_store.held


def app(name, version):
    return {"name": name, "args": {"version": version}}


def ours(version):
    model = {"repo_id": "acme/tiny", "revision": "main"}
    api = {"max_queued_requests": version}
    return {"name": "a", "import_path": IMPORT_PATH, "args": {"model": model, "api": api}}


def goal(apps):
    return {"applications": list(apps.values())}


def deployed(serving, names, commits=None, *, before=None, back=None, removed=()):
    """Record a rollout that was done."""
    scope = Scope(goal(serving), frozenset(names) - frozenset(removed), frozenset(removed))
    known = {name: {"": commit} for name, commit in (commits or {}).items()}
    rollout = Rollout(scope, goal(before or {}), known, back or {})
    history.record(Result("done", "", 1.0), rollout, serving)


def rolled_back(serving, names, former):
    """Record a rollout that went back by itself to `former`."""
    rollout = Rollout(Scope(goal(serving), frozenset(names)), goal(former), {"a": {"": "e" * 40}})
    history.record(Result("rolled_back", "it does not run", 1.0), rollout, serving)


class Cluster:
    """What serves, changed by rollouts that are remembered and by people who go past them."""

    def __init__(self):
        self.serving = {}

    def deploy(self, **versions):
        """Set some applications, None removes; remembered as one rollout."""
        before = dict(self.serving)
        self.past_us(**versions)
        removed = [name for name, version in versions.items() if version is None]
        deployed(self.serving, versions, before=before, removed=removed)

    def past_us(self, **versions):
        for name, version in versions.items():
            self.serving.pop(name, None)
            if version is not None:
                self.serving[name] = app(name, version)

    def back(self, *names):
        """Go back as the command does; returns what serves then."""
        names = names or history.last_rollout(self.serving)
        found = [history.former(name, self.serving.get(name)) for name in names]
        versions = {version.application: version for version in found if version}
        for name, version in versions.items():
            self.serving[name] = {**version.config, "nudged": time.time()}
        if versions:
            deployed(self.serving, versions, back=versions)
        return self.versions()

    def versions(self):
        return {name: each["args"]["version"] for name, each in sorted(self.serving.items())}


@pytest.fixture
def cluster():
    return Cluster()


def remembered(name):
    """The versions of an application, the last one None where it is removed."""
    versions = history.read().get(name, [])
    found = [version.config["args"]["version"] for version in versions]
    return [*found, None] if versions and versions[-1].removed else found


def test_former_is_the_newest_that_does_not_serve():
    """Whether the newest one serves, or something that nobody remembers."""
    assert history.former("a", None) is None
    for version in (1, 2):
        deployed({"a": app("a", version)}, ["a"])
    assert history.former("a", app("a", 2)).config == app("a", 1)
    assert history.former("a", app("a", 9)).config == app("a", 2)
    assert history.former("a", None).config == app("a", 2)
    assert history.former("b", None) is None


def test_former_is_not_the_same_again(cluster):
    """A second deploy of the same file must not make it its own former."""
    cluster.deploy(a=1)
    cluster.deploy(a=1)
    assert remembered("a") == [1]


def test_former_goes_further_back_the_second_time(cluster):
    """Never to and fro between two."""
    for version in (1, 2, 3):
        cluster.deploy(a=version)
    assert cluster.back() == {"a": 2}
    assert cluster.back() == {"a": 1}
    assert cluster.back() == {"a": 1}
    assert remembered("a") == [1]


def test_former_is_about_the_last_rollout_alone(cluster):
    """Somebody else's application on the same cluster stays at its version."""
    cluster.deploy(a=1)
    cluster.deploy(b=1)
    cluster.deploy(b=2)
    cluster.deploy(a=2)
    assert cluster.back() == {"a": 1, "b": 2}
    assert remembered("b") == [1, 2]


def test_former_of_one_application_by_its_name(cluster):
    """Whoever deployed last, and the other's own history is whole afterwards."""
    cluster.deploy(a=1)
    cluster.deploy(b=1)
    cluster.deploy(a=2)
    cluster.deploy(b=2)
    assert cluster.back("a") == {"a": 1, "b": 2}
    assert cluster.back("b") == {"a": 1, "b": 1}


def test_former_of_the_applications_of_one_file_together(cluster):
    """Those that it changed; one that it brought has nothing to go back to and stays."""
    cluster.deploy(a=1, b=1, c=1)
    cluster.deploy(a=2, b=2, c=1, d=1)
    assert cluster.back() == {"a": 1, "b": 1, "c": 1, "d": 1}


def test_former_of_what_went_past_this_command(cluster):
    """Such as a plain `serve deploy` of something worse, whoever deployed last here."""
    cluster.deploy(a=1)
    cluster.deploy(b=1)
    cluster.past_us(a=9)
    assert cluster.back() == {"a": 1, "b": 1}


def test_former_of_what_was_removed(cluster):
    """With its last version, whether it was taken away here or past this command."""
    cluster.deploy(a=1, b=1)
    cluster.deploy(b=None)
    assert remembered("b") == [1, None]
    assert cluster.back() == {"a": 1, "b": 1}
    cluster.past_us(b=None)
    assert cluster.back() == {"a": 1, "b": 1}


def test_last_rollout_is_the_last_whatever_a_clock_says(cluster, monkeypatch):
    """It may have been made on a machine whose clock is behind, or was set back since."""
    cluster.deploy(a=1, b=1)
    cluster.deploy(a=2)
    monkeypatch.setattr(time, "time", lambda: -5.0)
    cluster.deploy(b=2)
    assert history.last_rollout(cluster.serving) == ["b"]
    assert cluster.back() == {"a": 2, "b": 1}


@pytest.mark.parametrize("is_pinned", [False, True])
def test_rolled_back_leaves_the_way_back_open(is_pinned):
    """To the version before the one that serves again, which is not quite as it was."""
    first, second = ours(1), ours(2)
    deployed({"a": first}, ["a"], {"a": "c" * 40})
    deployed({"a": second}, ["a"], {"a": "d" * 40})
    back = pinned(second, {"": "d" * 40}) if is_pinned else second
    serving = {"a": {**back, "nudged": True}}
    rolled_back(serving, ["a"], {"a": back})
    assert history.last_rollout(serving) == ["a"]
    assert history.former("a", serving["a"]).config == first
    assert history.commits_of("a", serving["a"]) == {"": "d" * 40}
    rolled_back({"a": {**back, "nudged": 2}}, ["a"], {"a": serving["a"]})
    assert history.former("a", {**back, "nudged": 2}).config == first
    assert [version.config_commit for version in history.read()["a"]] == ["c" * 40, "d" * 40]


def test_former_that_nobody_remembers_changes_no_memory():
    """Such as what a plain `serve deploy` had put there."""
    deployed({"a": ours(1)}, ["a"])
    rolled_back({"a": ours(9)}, ["a", "b"], {"a": ours(9), "b": ours(1) | {"name": "b"}})
    assert history.former("a", ours(9)).config == ours(1)
    rolled_back({}, ["a"], {"a": ours(1)})
    assert history.former("a", None).config == ours(1)


def test_rolled_back_pushes_no_good_version_out(monkeypatch, cluster):
    """The entries of what served well stay, however many of failed rollouts come after them."""
    monkeypatch.setattr(rollout_history, "KEPT", 5)
    cluster.deploy(a=1)
    cluster.deploy(a=2)
    for number in range(20):
        before = dict(cluster.serving)
        cluster.serving["a"] = {**app("a", 2), "nudged": number}
        rolled_back(cluster.serving, ["a"], before)
    assert len(rollout_history.entries("a")) == 6
    assert remembered("a") == [1, 2]
    assert cluster.back() == {"a": 1}
    assert remembered("a") == [1]


def test_commits_of_a_good_version():
    """The latest one of a config that served twice; none of what was not remembered."""
    deployed({"a": ours(1)}, ["a"], {"a": "c" * 40})
    deployed({"a": ours(2)}, ["a"])
    assert history.commits_of("a", ours(1)) == {"": "c" * 40}
    assert history.commits_of("a", ours(2)) == {"": None}
    assert history.commits_of("a", ours(3)) == {}
    assert history.commits_of("b", ours(1)) == {}


def test_record_says_what_was_tried_and_why_it_ended():
    """Of one that went back: the reason, the commit and the config that did not serve."""
    deployed({"a": ours(1)}, ["a"], {"a": "c" * 40})
    rollout = Rollout(Scope(goal({"a": ours(2)}), frozenset("a")), None, {"a": {"": "e" * 40}})
    history.record(Result("failed", "not running within 5 s: a", 5.5), rollout, {"a": ours(2)})
    done, failed = rollout_history.entries("a")
    assert (done.what, done.why) == (What.DONE, "it runs and answered")
    assert (failed.what, failed.why) == (What.FAILED, "not running within 5 s: a")
    assert (failed.commit, failed.duration_s, failed.config) == ("e" * 40, 5.5, None)
    assert done.config_hash != failed.config_hash


def test_config_hash_is_of_the_args_as_the_gate_of_a_build_reads_them():
    """So a default that is written out is the same config, and a nudge of Serve's is too."""
    config = parse_args(ours(1)["args"])
    deployed({"a": {**ours(1), "deployments": [{"name": "LLMServer"}]}}, ["a"])
    (entry,) = rollout_history.entries("a")
    assert entry.config_hash == config_hash(config.model_dump(mode="json"))


def test_record_of_a_removal_has_what_served(cluster):
    """Also of what this command never set; it can come back."""
    cluster.past_us(theirs=7)
    cluster.deploy(theirs=None)
    (entry,) = rollout_history.entries("theirs")
    assert (entry.what, entry.removed) == (What.DONE, True)
    assert entry.why == "removed by name; its requests have ended"
    assert cluster.back() == {"theirs": 7}
    assert rollout_history.entries("theirs")[-1].why == "gone back to the version of entry 1"


def test_record_keeps_only_the_latest(cluster):
    """The cluster's memory is not a log; one busy application takes no other's place in it."""
    cluster.deploy(b=1)
    for version in range(30):
        cluster.deploy(a=version)
    assert remembered("a") == list(range(20, 30))
    assert remembered("b") == [1]


def test_commits_of_adapters_are_remembered():
    """And pinned when an application goes back."""
    first = ours(1)
    scope = Scope(goal({"a": first}), frozenset("a"))
    rollout = Rollout(scope, goal({}), {"a": {"": "c" * 40, "legal": "d" * 40}})
    history.record(Result("done", "", 1.0), rollout, {"a": first})
    (entry,) = history.read()["a"]
    assert (entry.commit, entry.adapter_commits) == ("c" * 40, {"legal": "d" * 40})
    assert history.commits_of("a", first) == entry.config_commits
