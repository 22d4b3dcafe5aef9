"""The question to a new version."""

import threading
from types import SimpleNamespace

import pytest
from ray.exceptions import GetTimeoutError

from serve_app.errors import ConfigError
from serve_app.rollout import serve_client
from serve_app.rollout.serve_client import Instance


def test_canary_takes_a_model_that_never_answers_for_a_fault(monkeypatch):
    """A rollout whose model hangs must end, so that it can go back."""
    hangs = threading.Event()
    monkeypatch.setattr(serve_client, "_canary", lambda _name: hangs.wait(5) or None)
    monkeypatch.setattr(serve_client, "CANARY_TIMEOUT_S", 0.05)
    assert object.__new__(Instance).ask("llm") == "no answer within 0.05 s"
    hangs.set()


@pytest.mark.parametrize("ask", [Instance.goal, Instance.states])
def test_ask_reports_a_controller_that_hangs(monkeypatch, ask):
    """Within a limit, in one sentence."""
    limits = []

    def no_answer(timeout_s):
        limits.append(timeout_s)
        raise GetTimeoutError

    monkeypatch.setattr(serve_client, "instance_details", no_answer)
    with pytest.raises(ConfigError, match=r"does not answer \(GetTimeoutError\)"):
        ask(object.__new__(Instance))
    assert limits == [serve_client.ANSWER_TIMEOUT_S]


@pytest.mark.parametrize(("given", "applied"), [({}, 40.0), ({"target_capacity": 100}, 100)])
def test_goal_keeps_the_clusters_capacity_where_a_file_says_nothing(monkeypatch, given, applied):
    """KubeRay sets it while it moves the traffic; it is of all applications."""
    reported = []
    serving = object.__new__(Instance)
    serving._client = SimpleNamespace(deploy_apps=lambda schema, _blocking: reported.append(schema))
    monkeypatch.setattr(
        serve_client, "instance_details", lambda _timeout_s: {"target_capacity": 40.0}
    )
    serving.apply({"applications": [{"name": "a", "import_path": "x:y"}], **given})
    assert [schema.target_capacity for schema in reported] == [applied]
