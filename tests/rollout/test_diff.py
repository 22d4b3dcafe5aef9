"""What the plan says of a changed config."""

import pytest

from serve_app.rollout.diff import SHOWN, changes
from serve_app.serve_config import IMPORT_PATH


def config(name="llm", **app):
    whole = {"name": name, "import_path": IMPORT_PATH, "args": {"model": {"repo_id": "a/b"}}}
    return {"applications": [whole | app]}


def scaled(**fields):
    return config(deployments=[{"name": "LLMServer", **fields}])


def test_changes_of_applications_that_come_stay_and_go():
    """One line each."""
    before = {"applications": config("a")["applications"] + config("b")["applications"]}
    goal = {"applications": config("b")["applications"] + config("c")["applications"]}
    assert list(changes(before, goal)) == [
        "b: unchanged, nothing restarts",
        "c: new",
        "a: removed, its requests end",
    ]
    assert list(changes(None, goal)) == ["b: new", "c: new"]


def test_changes_of_the_rollouts_own_applications_alone():
    """What others run beside it is theirs; one that goes is always named."""
    before = {"applications": [{"name": "a"}, {"name": "b", "args": {"x": 1}}, {"name": "c"}]}
    goal = {"applications": [{"name": "a", "args": {"y": 1}}, {"name": "b"}]}
    first, *_, last = changes(before, goal, {"b"})
    assert first.startswith("b: changes args")
    assert last == "c: removed, its requests end"
    assert not any(line.startswith("a:") for line in changes(before, goal, {"b"}))


def test_changes_name_every_leaf_with_both_values():
    """What stands on one side alone was or becomes the default."""
    before = config(args={"engine": {"max_context_tokens": 8192}, "api": {"a": 1}})
    goal = config(args={"engine": {"max_context_tokens": 16384}, "model": {"revision": "x" * 99}})
    first, *leaves = changes(before, goal)
    assert first.startswith("llm: changes args; a new build with the gate")
    assert leaves == [
        "llm: args.engine.max_context_tokens: 8192 -> 16384",
        "llm: args.api.a: 1 -> default",
        f'llm: args.model.revision: default -> "{"x" * 58}…',
    ]


def test_changes_are_counted_when_they_are_many():
    """The plan stays on the screen."""
    goal = config(args={"engine": {str(n): n for n in range(SHOWN + 3)}})
    *_, last = changes(config(args={}), goal)
    assert last == "llm: and 3 more"


@pytest.mark.parametrize(
    ("before", "goal", "effect"),
    [
        (config(), config(runtime_env={"env_vars": {"A": "b"}}), "a new build"),
        (config(), config(import_path="x:y"), "a new build"),
        (config(route_prefix="/"), config(route_prefix="/x"), "nothing restarts"),
        (scaled(num_replicas=1), scaled(num_replicas=2), "set in place"),
        (config(), scaled(max_ongoing_requests=5), "set in place"),
        (
            scaled(autoscaling_config={"max_replicas": 2}),
            scaled(autoscaling_config={"max_replicas": 3}, health_check_period_s=3),
            "set in place",
        ),
        (
            scaled(num_replicas=2),
            scaled(autoscaling_config={"max_replicas": 3}),
            "a new build with the gate",
        ),
        (
            scaled(autoscaling_config={"max_replicas": 2, "policy": {"policy_function": "a:b"}}),
            scaled(autoscaling_config={"max_replicas": 2, "policy": {"policy_function": "c:d"}}),
            "a new build with the gate",
        ),
        (
            scaled(ray_actor_options={"num_gpus": 1}),
            scaled(ray_actor_options={"num_gpus": 2}, num_replicas=2),
            "no build: replicas of LLMServer are replaced, and each proves its own access",
        ),
        (config(), scaled(request_router_config={"a": 1}), "a new build with the gate"),
        (config(), config(route_prefix=None), "unchanged"),
        (config(), scaled(graceful_shutdown_timeout_s=5), "replicas may be replaced"),
        (config(), config(external_scaler_enabled=True), "replicas may be replaced"),
        (scaled(num_replicas=2), scaled(num_replicas=2) | {"x": 1}, "unchanged"),
    ],
)
def test_changes_say_what_restarts(before, goal, effect):
    """By what Serve 2.60 does with each kind of change."""
    first, *_ = changes(before, goal)
    assert effect in first


def test_changes_of_a_tree_into_a_value():
    """Nothing is compared for ever."""
    *_, line = changes(config(args={"engine": {"a": 1}}), config(args={"engine": 5}))
    assert line == 'llm: args.engine: {"a": 1} -> 5'


def test_changes_repeat_no_variables_value():
    """What a plain `serve deploy` put there may be a key of any form."""
    secret = "Zx" * 12
    before = config(runtime_env={"env_vars": {"KEY": secret, "GONE": secret}})
    goal = config(runtime_env={"env_vars": {"KEY": "other"}})
    for lines in (list(changes(before, goal)), list(changes(config(), before))):
        assert secret not in "".join(lines)
        assert "llm: runtime_env.env_vars.KEY: changed" in lines
