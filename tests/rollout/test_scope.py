"""What a rollout leaves alone."""

import pytest
from ray.serve.schema import ServeDeploySchema

from serve_app.errors import ConfigError
from serve_app.rollout.scope import pinned, restored, scope_of
from serve_app.serve_config import IMPORT_PATH


def app(name, **fields):
    return {"name": name, "import_path": "x:y", "route_prefix": f"/{name}", **fields}


def config(*apps, **fields):
    return {"applications": list(apps), **fields}


def test_scope_leaves_what_is_not_in_the_file():
    """Another team's traffic does not end because somebody deploys beside it."""
    other = app("a", args={"big": True}, deployments=[{"name": "D", "num_replicas": 3}])
    scope = scope_of(config(app("b", args={"new": 1})), config(other, app("b")))
    assert scope.goal["applications"] == [other, app("b", args={"new": 1})]
    assert (scope.set_names, scope.removed, scope.others) == ({"b"}, frozenset(), ["a"])


def test_scope_on_an_empty_cluster_is_the_whole_file():
    """And what it says of HTTP counts, as Serve is started with it."""
    file = config(app("b"), http_options={"port": 8001}, proxy_location="HeadOnly")
    for serving in (None, config()):
        scope = scope_of(file, serving)
        assert scope.goal == file
        assert scope.others == []


def test_scope_removes_an_application_only_by_its_name():
    """And counts as a part of the rollout, so that a failed one brings it back."""
    scope = scope_of(config(app("c")), config(app("a"), app("b")), ["a"])
    assert [each["name"] for each in scope.goal["applications"]] == ["b", "c"]
    assert (scope.removed, scope.names) == ({"a"}, {"a", "c"})


def test_scope_refuses_a_name_that_does_not_serve_and_lists_those_that_do():
    """A typing error must not pass in silence."""
    with pytest.raises(ConfigError, match=r"--remove x: no such application serves.*: a, b"):
        scope_of(config(app("c")), config(app("a"), app("b")), ["x"])
    with pytest.raises(ConfigError, match="those that do: none"):
        scope_of(config(app("c")), None, ["x"])


def test_scope_refuses_to_remove_a_name_that_the_file_sets():
    """Which of the two was meant is not for us to choose."""
    with pytest.raises(ConfigError, match="--remove b: the file has this application"):
        scope_of(config(app("b")), config(app("b")), ["b"])


@pytest.mark.parametrize("route", ["/", "/x"])
def test_scope_refuses_a_renamed_application_on_the_same_route(route):
    """Before there was a merge the old one was removed; now the sentence says what to do."""
    file, serving = app("new", route_prefix=route), app("old", route_prefix=route)
    if route == "/":
        del file["route_prefix"]  # Serve's default
    with pytest.raises(ConfigError, match=rf"same route_prefix {route}; .*: --remove old$"):
        scope_of(config(file), config(serving))
    assert scope_of(config(file), config(serving), ["old"]).set_names == {"new"}


def test_scope_refuses_two_applications_of_the_file_on_one_route():
    """Nothing to remove there."""
    with pytest.raises(ConfigError, match=r"b and a, in the file too, .*another one$"):
        scope_of(config(app("a", route_prefix="/"), app("b", route_prefix="/")), None)


def test_scope_lets_any_number_of_applications_have_no_route():
    """Serve lets any number have none."""
    hidden = [app(name, route_prefix=None) for name in "ab"]
    assert scope_of(config(hidden[0]), config(hidden[1])).others == ["b"]


def test_scope_gives_the_files_logging_to_its_own_applications_alone():
    """Serve gives a file's logging to every application that has none, others' too."""
    own = {"log_level": "DEBUG"}
    file = config(app("b"), app("c", logging_config=own), logging_config={"log_level": "ERROR"})
    scope = scope_of(file, config(app("a")))
    assert "logging_config" not in scope.goal
    assert scope.goal["applications"] == [
        app("a"),
        app("b", logging_config={"log_level": "ERROR"}),
        app("c", logging_config=own),
    ]


def test_scope_applies_a_config_for_serve():
    """Also with what Serve itself reports of the others."""
    serving = ServeDeploySchema.model_validate(config(app("a"))).model_dump(exclude_unset=True)
    goal = scope_of(config(app("b"), http_options={"port": 1}), serving).goal
    assert {each.name for each in ServeDeploySchema.model_validate(goal).applications} == {"a", "b"}


def test_restored_leaves_the_others_alone():
    """One former version, one application that comes back, one that goes."""
    serving = config(app("a", v=2), app("b", v=2), app("d", v=1))
    assert restored(serving, {"a": app("a", v=1), "c": app("c"), "d": None}) == config(
        app("a", v=1), app("b", v=2), app("c")
    )
    assert restored(None, {"a": app("a")}) == config(app("a"))


def test_restored_refuses_a_route_that_is_taken():
    """Somebody has put another application there since."""
    with pytest.raises(ConfigError, match="same route_prefix /a"):
        restored(config(app("b", route_prefix="/a")), {"a": app("a")})


def test_pinned_former_version_to_what_it_served():
    """A branch may mean something else by now; a directory and others' applications have none."""
    ours = app("a", import_path=IMPORT_PATH, args={"model": {"repo_id": "o/r"}, "api": {}})
    assert pinned(ours, {"": "c" * 40})["args"] == {
        "model": {"repo_id": "o/r", "revision": "c" * 40},
        "api": {},
    }
    assert "revision" not in ours["args"]["model"]
    local = app("a", import_path=IMPORT_PATH, args={"model": {"path": "/m"}})
    theirs = app("a", args={"model": {"repo_id": "o/r"}})
    for each, commit in ((ours, None), (local, "c" * 40), (theirs, "c" * 40)):
        assert pinned(each, {"": commit}) == each


def test_pinned_adapters():
    """Each by its name, whatever the base is; one that is not known keeps its branch."""
    adapters = [{"name": "x", "repo_id": "o/x"}, {"name": "y", "repo_id": "o/y", "revision": "v1"}]
    args = {"model": {"path": "/m", "adapters": adapters}}
    ours = app("a", import_path=IMPORT_PATH, args=args)
    found = pinned(ours, {"": None, "x": "c" * 40})["args"]["model"]
    assert found == {"path": "/m", "adapters": [{**adapters[0], "revision": "c" * 40}, adapters[1]]}
    assert "revision" not in adapters[0]
