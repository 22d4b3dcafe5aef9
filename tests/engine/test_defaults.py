"""Sampling defaults of a model count where a request is silent."""

import json

import pytest
from structlog.testing import capture_logs

from serve_app.engine.defaults import read_defaults, resolved
from serve_app.protocol import MODEL_DEFAULTS, SamplingParams

SILENT = SamplingParams(unset=frozenset(MODEL_DEFAULTS))
LLAMA = {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [1, 2]}


def read(directory, published):
    text = published if isinstance(published, str) else json.dumps(published)
    (directory / "generation_config.json").write_text(text)
    return read_defaults(directory)


def test_read_defaults_of_the_authors(tmp_path):
    """The five that vLLM takes over, and nothing else of the file."""
    assert read(tmp_path, LLAMA) == {"temperature": 0.6, "top_p": 0.9}
    everything = {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
    }
    assert read(tmp_path, everything) == everything
    assert set(everything) == set(MODEL_DEFAULTS)
    assert read(tmp_path, {"top_k": -1, "temperature": None}) == {"top_k": 0}


@pytest.mark.parametrize("published", ["", "[]", "{", '"x"', {}, {"temperature": None}])
def test_read_defaults_of_a_file_that_says_nothing(tmp_path, published):
    """Damaged or empty, as well as absent."""
    assert read(tmp_path, published) == {}
    assert read_defaults(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", [1]),
        ("temperature", 1e999),
        ("top_p", 0),
        ("top_p", 1.5),
        ("top_k", 0.5),
        ("top_k", -2),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", 0.001),
    ],
)
def test_read_defaults_leaves_out_a_value_that_no_request_could_ask_for(tmp_path, name, value):
    """With a line in the log; the others count."""
    with capture_logs() as logs:
        assert read(tmp_path, {name: value, "eta": 1} | {"min_p": 0.5} | {name: value}) == (
            {} if name == "min_p" else {"min_p": 0.5}
        )
    assert logs == [
        {
            "event": "model.defaults_unusable",
            "log_level": "warning",
            "file": "generation_config.json",
            "fields": [name],
        }
    ]


def test_resolved_takes_defaults_where_the_request_is_silent():
    """What the client says stays, also where it says what is neutral."""
    defaults = {"temperature": 0.6, "top_k": 20}
    assert resolved(SILENT, defaults).temperature == 0.6
    assert resolved(SILENT, defaults).top_k == 20
    assert resolved(SILENT, {}) == SILENT
    said = SamplingParams(temperature=1.0, unset=frozenset({"top_k"}))
    assert resolved(said, defaults).temperature == 1.0
    assert resolved(said, defaults).top_k == 20
    assert resolved(SamplingParams(), defaults) == SamplingParams()
