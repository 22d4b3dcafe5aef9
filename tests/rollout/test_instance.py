"""The question to a new version."""

import threading

from serve_app.rollout import instance
from serve_app.rollout.instance import Instance


def test_a_model_that_never_answers_is_a_fault_and_not_a_wait(monkeypatch):
    """A rollout whose model hangs must end, so that it can go back."""
    hangs = threading.Event()
    monkeypatch.setattr(instance, "_canary", lambda _name: hangs.wait(5) or None)
    monkeypatch.setattr(instance, "CANARY_TIMEOUT_S", 0.05)
    assert object.__new__(Instance).ask("llm") == "no answer within 0.05 s"
    hangs.set()
