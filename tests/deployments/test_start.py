"""What a replica's start does beside its proof of access."""

import gc
import threading

import pytest

from serve_app.config import EngineConfig
from serve_app.deployments.start import import_libraries
from serve_app.engine import backends
from serve_app.errors import ModelLoadError


class Spans:
    """Keeps the phases that it is given."""

    def __init__(self):
        self.phases = {}

    def follow(self, phases, *, started_at):
        """Keep them."""
        self.phases |= phases


@pytest.mark.parametrize("fault", [None, ModelLoadError("not installed")])
def test_import_libraries_keeps_nobody_waiting(monkeypatch, fault):
    """The caller goes on; garbage is collected again afterwards; a fault is loading's to say."""
    begun, go_on, collected = threading.Event(), threading.Event(), []

    def slow(engine):
        begun.set()
        assert go_on.wait(10)
        collected.append(gc.isenabled())
        if fault:
            raise fault

    monkeypatch.setattr(backends, "import_libraries", slow)
    spans = Spans()
    try:
        thread = import_libraries(EngineConfig(), spans)
        assert begun.wait(10)
        assert not spans.phases
        go_on.set()
        thread.join(10)
    finally:
        gc.unfreeze()
    assert collected == [False]
    assert gc.isenabled()
    assert list(spans.phases) == ["libraries"]
