"""Why a notebook has no token."""

import sys
from types import ModuleType
from typing import Any

import pytest

from serve_app.access import notebook
from serve_app.access.token import resolve_token
from serve_app.config import AccessConfig


@pytest.fixture
def colab(monkeypatch):
    """A Colab runtime whose secret raises `answer`, or has a value."""
    userdata: Any = ModuleType("google.colab.userdata")
    userdata.NotebookAccessError = type("NotebookAccessError", (Exception,), {})
    userdata.SecretNotFoundError = type("SecretNotFoundError", (Exception,), {})
    userdata.answer = None

    def get(name):
        assert name == "HF_TOKEN"
        if userdata.answer is not None:
            raise userdata.answer
        return "value"

    userdata.get = get
    for name in ("google", "google.colab"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "google.colab.userdata", userdata)
    return userdata


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("NotebookAccessError", "may not read: switch on `Notebook access`"),
        ("SecretNotFoundError", "Colab has no secret HF_TOKEN"),
        (None, "restart the session"),
    ],
)
def test_reasons_distinguish_colabs_secret_from_a_missing_one(colab, kind, words):
    """Each has another fix."""
    colab.answer = getattr(colab, kind)() if kind else None
    (reason,) = notebook.reasons()
    assert words in reason


def test_reasons_in_a_runtime_without_a_panel_are_no_error(colab):
    """Whatever Colab raises."""
    colab.answer = TimeoutError("panel")
    assert list(notebook.reasons()) == ["Colab's secrets could not be read (TimeoutError)"]


def test_resolve_token_in_a_kernel_that_began_before_the_variable(monkeypatch, tmp_path):
    """The reason stands beside the missing token, and only in a notebook."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    assert resolve_token(AccessConfig()).report.warnings == ()
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    (reason,) = resolve_token(AccessConfig()).report.warnings
    assert "exported later" in reason
