"""A cache of the test's own, and repositories whose bytes come as slowly as a test wants."""

from __future__ import annotations

import io
import time

import pytest
from huggingface_hub import constants


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    return tmp_path / "cache"


class SlowFile(io.BytesIO):
    """Content that takes its time."""

    def __init__(self, content, pause_s):
        super().__init__(content)
        self._pause_s = pause_s

    def read(self, size=-1):
        time.sleep(self._pause_s)
        return super().read(size)


def serve_other_bytes(file, content, *, pause_s=0.0):
    """Let the Hub send this content of a file, whatever it says about it."""
    file.open = lambda: SlowFile(content, pause_s)
