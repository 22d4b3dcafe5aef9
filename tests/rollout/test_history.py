"""What a rollout can go back to."""

import json
import time

import pytest

from serve_app.rollout import history
from serve_app.rollout.scope import pinned
from serve_app.serve_config import IMPORT_PATH


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
    return {"name": "a", "import_path": IMPORT_PATH, "args": {"model": model, "v": version}}


class Cluster:
    """What serves, changed by rollouts that are remembered and by people who go past them."""

    def __init__(self):
        self.serving = {}

    def deploy(self, **versions):
        """Set some applications, None removes; remembered as one rollout."""
        self.past_us(**versions)
        history.remember(self.serving, versions)

    def past_us(self, **versions):
        for name, version in versions.items():
            self.serving.pop(name, None)
            if version is not None:
                self.serving[name] = app(name, version)

    def back(self, *names):
        """Go back as the command does; returns what serves then."""
        names = names or history.last_rollout(self.serving)
        found = [history.former(name, self.serving.get(name)) for name in names]
        versions = [version for version in found if version]
        for version in versions:
            self.serving[version.name] = {**version.app, "nudged": time.time()}
        history.remember(self.serving, [version.name for version in versions])
        history.go_back(versions, self.serving)
        return self.versions()

    def versions(self):
        return {name: each["args"]["version"] for name, each in sorted(self.serving.items())}


@pytest.fixture
def cluster():
    return Cluster()


def remembered(name):
    return [v.app and v.app["args"]["version"] for v in history.read() if v.name == name]


def test_the_newest_that_does_not_serve_is_the_former():
    """Whether the newest one serves, or something that nobody remembers."""
    assert history.former("a", None) is None
    for version in (1, 2):
        history.remember({"a": app("a", version)}, ["a"])
    assert history.former("a", app("a", 2)).app == app("a", 1)
    assert history.former("a", app("a", 9)).app == app("a", 2)
    assert history.former("a", None).app == app("a", 2)
    assert history.former("b", None) is None


def test_the_same_again_is_no_new_version(cluster):
    """A second deploy of the same file must not make it its own former."""
    cluster.deploy(a=1)
    cluster.deploy(a=1)
    assert remembered("a") == [1]


def test_going_back_twice_goes_further_back(cluster):
    """Never to and fro between two."""
    for version in (1, 2, 3):
        cluster.deploy(a=version)
    assert cluster.back() == {"a": 2}
    assert cluster.back() == {"a": 1}
    assert cluster.back() == {"a": 1}
    assert remembered("a") == [1]


def test_going_back_is_about_the_last_rollout_alone(cluster):
    """Somebody else's application on the same cluster stays at its version."""
    cluster.deploy(a=1)
    cluster.deploy(b=1)
    cluster.deploy(b=2)
    cluster.deploy(a=2)
    assert cluster.back() == {"a": 1, "b": 2}
    assert remembered("b") == [1, 2]


def test_one_application_goes_back_by_its_name(cluster):
    """Whoever deployed last, and the other's own history is whole afterwards."""
    cluster.deploy(a=1)
    cluster.deploy(b=1)
    cluster.deploy(a=2)
    cluster.deploy(b=2)
    assert cluster.back("a") == {"a": 1, "b": 2}
    assert cluster.back("b") == {"a": 1, "b": 1}


def test_the_applications_of_one_file_go_back_together(cluster):
    """Those that it changed; one that it brought has nothing to go back to and stays."""
    cluster.deploy(a=1, b=1, c=1)
    cluster.deploy(a=2, b=2, c=1, d=1)
    assert cluster.back() == {"a": 1, "b": 1, "c": 1, "d": 1}


def test_what_went_past_this_command_is_what_goes_back(cluster):
    """Such as a plain `serve deploy` of something worse, whoever deployed last here."""
    cluster.deploy(a=1)
    cluster.deploy(b=1)
    cluster.past_us(a=9)
    assert cluster.back() == {"a": 1, "b": 1}


def test_what_was_removed_comes_back(cluster):
    """With its last version, whether it was taken away here or past this command."""
    cluster.deploy(a=1, b=1)
    cluster.deploy(b=None)
    assert remembered("b") == [1, None]
    assert cluster.back() == {"a": 1, "b": 1}
    cluster.past_us(b=None)
    assert cluster.back() == {"a": 1, "b": 1}


def test_the_last_rollout_is_the_last_whatever_a_clock_says(cluster, monkeypatch):
    """It may have been made on a machine whose clock is behind, or was set back since."""
    cluster.deploy(a=1, b=1)
    cluster.deploy(a=2)
    monkeypatch.setattr(time, "time", lambda: -5.0)
    cluster.deploy(b=2)
    assert history.last_rollout(cluster.serving) == ["b"]
    assert cluster.back() == {"a": 2, "b": 1}


@pytest.mark.parametrize("is_pinned", [False, True])
def test_a_rollout_that_went_back_by_itself_leaves_the_way_back_open(is_pinned):
    """To the version before the one that serves again, which is not quite as it was."""
    first, second = ours(1), ours(2)
    history.remember({"a": first}, ["a"], {"a": "c" * 40})
    history.remember({"a": second}, ["a"], {"a": "d" * 40})
    back = pinned(second, "d" * 40) if is_pinned else second
    serving = {"a": {**back, "nudged": True}}
    history.restate(serving, {"a": back})
    assert history.last_rollout(serving) == ["a"]
    assert history.former("a", serving["a"]).app == first
    assert history.commit_of("a", serving["a"]) == "d" * 40


def test_going_back_to_what_nobody_remembers_changes_no_memory():
    """Such as what a plain `serve deploy` had put there."""
    history.remember({"a": ours(1)}, ["a"])
    history.restate({"a": ours(9)}, {"a": ours(9), "b": ours(1)})
    assert history.former("a", ours(9)).app == ours(1)
    history.restate({}, {"a": ours(1)})
    assert history.former("a", None).app == ours(1)


def test_the_commit_of_a_good_version_is_known():
    """The latest one of a config that served twice; none of what was not remembered."""
    history.remember({"a": ours(1)}, ["a"], {"a": "c" * 40})
    history.remember({"a": ours(2)}, ["a"])
    assert history.commit_of("a", ours(1)) == "c" * 40
    assert history.commit_of("a", ours(2)) is None
    assert history.commit_of("a", ours(3)) is None
    assert history.commit_of("b", ours(1)) is None


def test_only_the_latest_are_kept(cluster):
    """The cluster's memory is not a log; one busy application takes no other's place in it."""
    cluster.deploy(b=1)
    for version in range(30):
        cluster.deploy(a=version)
    assert remembered("a") == list(range(20, 30))
    assert remembered("b") == [1]


def test_what_an_older_version_of_the_package_remembered_counts(store, cluster):
    """A cluster outlives an upgrade."""
    entries = [
        {"goal": {"applications": [app("a", 1), {"args": {}}]}, "since": 100.0},
        {"goal": {"applications": [app("a", 2)]}, "since": 200.0},
    ]
    store[history.OLD_KEY] = json.dumps(entries)
    assert history.former("a", app("a", 2)) == history.Version("a", app("a", 1), 100.0)
    assert history.former("default", None).since == 100.0
    cluster.serving = {"a": app("a", 2)}
    assert history.last_rollout(cluster.serving) == ["a", "default"]
    assert cluster.back("a") == {"a": 1}
    assert remembered("a") == [1]
