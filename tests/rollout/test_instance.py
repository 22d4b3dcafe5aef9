"""The question to a new version."""

import threading

import pytest
from ray.exceptions import GetTimeoutError

from serve_app.errors import ConfigError
from serve_app.rollout import instance
from serve_app.rollout.instance import Instance


def test_a_model_that_never_answers_is_a_fault_and_not_a_wait(monkeypatch):
    """A rollout whose model hangs must end, so that it can go back."""
    hangs = threading.Event()
    monkeypatch.setattr(instance, "_canary", lambda _name: hangs.wait(5) or None)
    monkeypatch.setattr(instance, "CANARY_TIMEOUT_S", 0.05)
    assert object.__new__(Instance).ask("llm") == "no answer within 0.05 s"
    hangs.set()


@pytest.mark.parametrize("ask", [Instance.goal, Instance.states])
def test_a_controller_that_hangs_is_told_and_not_waited_for(monkeypatch, ask):
    """Within a limit, in one sentence."""
    limits = []

    def no_answer(timeout_s):
        limits.append(timeout_s)
        raise GetTimeoutError

    monkeypatch.setattr(instance, "instance_details", no_answer)
    with pytest.raises(ConfigError, match=r"does not answer \(GetTimeoutError\)"):
        ask(object.__new__(Instance))
    assert limits == [instance.ANSWER_TIMEOUT_S]
