"""What going back is about, before anything is touched."""

from types import SimpleNamespace

import pytest

from serve_app.errors import ConfigError
from serve_app.rollout import command, history
from serve_app.rollout.history import Version
from serve_app.serve_config import served


def app(name, version):
    return {"name": name, "import_path": "x:y", "args": {"version": version}}


@pytest.fixture
def cluster(monkeypatch):
    """A cluster's memory, and what serves there."""
    there = SimpleNamespace(versions=[], serving={}, asked=0)

    def instance(_goal):
        there.asked += 1
        return SimpleNamespace(goal=lambda: {"applications": list(there.serving.values())})

    monkeypatch.setattr(history, "read", lambda: there.versions)
    monkeypatch.setattr(command, "Instance", instance)
    return there


def test_without_a_memory_nothing_is_started_and_nothing_gone_back_to(cluster):
    """Asking Serve would start it on a cluster that has none."""
    with pytest.raises(ConfigError, match=r"^no earlier config that served is remembered"):
        command.former(None)
    with pytest.raises(ConfigError, match="no earlier config of a that served"):
        command.former("a")
    assert cluster.asked == 0


def test_an_application_without_a_former_version_names_those_that_may_have_one(cluster):
    """Nobody else's is gone back with by guess."""
    cluster.versions = [Version("a", app("a", 1), 1.0), Version("b", app("b", 1), 2.0)]
    cluster.serving = {name: app(name, 1) for name in "ab"}
    with pytest.raises(ConfigError, match=r"of b that .* `serve-app rollback APP` .*: a$"):
        command.former(None)


def test_the_gate_asks_for_what_goes_back_alone(cluster):
    """What others serve needs no grant of whoever goes back."""
    cluster.versions = [
        Version("a", app("a", 1), 1.0),
        Version("b", app("b", 1), 2.0),
        Version("b", app("b", 2), 3.0),
    ]
    cluster.serving = {"a": app("a", 1), "b": app("b", 2)}
    good = command.former(None)
    assert good.applications == {"applications": [app("b", 1)]}
    assert served(good.applications) == ()  # another package's needs none of ours either
