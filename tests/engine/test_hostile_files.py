"""A model's small files as a stranger may have written them: loaded, or one sentence.

The libraries raise anything over them: type errors, assertions, their own validation errors over
several lines, the tokenizers' bare `Exception`. A replica that fails holds before it starts
again, which it does for our own errors only.
"""

import json
import shutil
import socket
import time

import pytest

from serve_app.config import ModelConfig
from serve_app.engine.model import loading
from serve_app.errors import ModelLoadError
from tests.models import make_model

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
DEEP = b"[" * 100_000


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("sound") / "m")


@pytest.fixture
def model(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "m")


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def load(directory):
    model = ModelConfig(path=str(directory), dtype="float32")
    return loading.load(directory, model, num_gpus=0, num_cpus=1)


def refused(directory):
    began = time.monotonic()
    with pytest.raises(ModelLoadError) as caught:
        load(directory)
    assert time.monotonic() - began < 30
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600
    return caught.value.message


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": {"a": 1}},
        {"hidden_act": "nope"},
        {"rms_norm_eps": "x"},
        {"rope_parameters": 1},
        {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "nope"}},
        {"pad_token_id": 2**31},
        {"layer_types": 2},
        {"layer_types": "x"},
        {"per_layer_config": 1},
        {"dtype": []},
        {"dtype": "{{7*7}}"},
        {"tie_word_embeddings": {}},
        {"_attn_implementation": []},
        {"id2label": 5},
        {"auto_map": 1},
        {"num_hidden_layers": 4000},
        {"num_labels": 2**31},
        {"hidden_size": 10**12},
        {"vocab_size": 0},
        {"num_attention_heads": 0},
        {"intermediate_size": []},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"quantization_config": {"quant_method": "fp8"}},
        {"transformers_weights": "../../../etc/x.safetensors"},
        {"transformers_weights": "absent.safetensors"},
    ],
    ids=str,
)
def test_load_refuses_a_config_that_no_model_has(model, changes):
    """Other types, other sizes, other families."""
    edit(model / CONFIG, **changes)
    assert "cannot be loaded" in refused(model)


@pytest.mark.parametrize(
    "name", [CONFIG, "tokenizer.json", TOKENIZER_CONFIG, "model.safetensors.index.json"]
)
@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", DEEP, b"9" * 9999], ids=len)
def test_load_refuses_files_that_are_no_json_objects(model, name, content):
    """Empty, nested without end, in no encoding."""
    if name.endswith("index.json"):
        (model / "model.safetensors").rename(model / "a.safetensors")
    (model / name).write_bytes(content)
    refused(model)


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": None},
        {"auto_map": 3},
        {"auto_map": [[[]]]},
        {"tokenizer_class": 5},
        {"tokenizer_class": {}},
        {"added_tokens_decoder": "x"},
        {"extra_special_tokens": 4},
        {"chat_template": "x" * 2_000_000},
        {"chat_template": [{"name": "default", "template": "x" * 2_000_000}]},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_load_refuses_a_tokenizer_config_that_no_tokenizer_has(model, changes):
    """Types that its library does not look for, and templates without end."""
    edit(model / TOKENIZER_CONFIG, **changes)
    refused(model)


@pytest.mark.parametrize(
    "changes",
    [{"version": 1}, {"model": {"a": 1}}, {"decoder": 7}, {"truncation": "x"}, {"model": None},
     {"pre_tokenizer": "x"}, {"post_processor": []}],
    ids=str,
)  # fmt: skip
def test_load_refuses_a_tokenizer_json_that_no_tokenizer_has(model, changes):
    """Its library raises `Exception` itself."""
    edit(model / "tokenizer.json", **changes)
    assert "tokenizer cannot be loaded" in refused(model)


@pytest.mark.parametrize("value", [float("nan"), "x", {}, [[1]], [None, "x"], True])
def test_load_ignores_an_end_that_is_no_token(model, value):
    """What is left are the ends that are ids."""
    edit(model / "generation_config.json", eos_token_id=value)
    assert load(model).eos_token_ids == {0}


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/a.jinja"])
def test_load_bounds_a_template_file(model, name):
    """Before it is parsed."""
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("x" * 2_000_000)
    assert name in refused(model)


@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", "vocab.json"])
def test_load_bounds_a_file_that_is_read_whole(model, name):
    """A sparse file costs nothing to send and everything to read."""
    with (model / name).open("ab") as stream:
        stream.truncate(1 << 34)
    assert name in refused(model)


def test_load_refuses_an_index_that_leads_out(model, tmp_path):
    """Transformers would open it."""
    (model / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "folder above" in refused(model)


def test_load_asks_nobody_for_a_directory(model, monkeypatch):
    """Whatever repositories its files name."""

    def refuse(*_args, **_options):
        raise AssertionError("somebody is asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    edit(model / CONFIG, _name_or_path="evil/x", base_model_name_or_path="evil/x")
    edit(model / TOKENIZER_CONFIG, name_or_path="evil/x", _commit_hash="main")
    adapter = {"base_model_name_or_path": "evil/x", "peft_type": "LORA", "auto_mapping": {}}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    assert load(model).vocab_size > 0
