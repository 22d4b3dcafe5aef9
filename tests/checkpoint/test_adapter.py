"""Which adapters vLLM can serve, by what their repositories say."""

import json

import pytest

from serve_app.checkpoint.adapter import adapter_refusal, check_adapter
from serve_app.checkpoint.files import model_files, weights_entry
from serve_app.errors import ModelLoadError
from tests.access.cases import ADAPTER_CONFIG, adapter_files

NAMES = set(adapter_files())


def test_adapter_refusal_of_a_plain_adapter():
    """PEFT's defaults, written out as PEFT does it."""
    written = {
        "bias": "none", "use_dora": False, "modules_to_save": None, "layer_replication": None,
        "init_lora_weights": True, "rank_pattern": {"k_proj": 4}, "alpha_pattern": {},
    }  # fmt: skip
    assert adapter_refusal(ADAPTER_CONFIG, NAMES) is None
    assert adapter_refusal(ADAPTER_CONFIG | written, NAMES) is None
    assert adapter_refusal(ADAPTER_CONFIG | {"init_lora_weights": "gaussian"}, NAMES) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "no LoRA adapter"),
        ({"peft_type": None}, "no LoRA adapter"),
        ({"r": 0}, "rank"),
        ({"r": 513}, "rank"),
        ({"r": "8"}, "rank"),
        ({"r": True}, "rank"),
        ({"rank_pattern": {"q_proj": 1024}}, "rank"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ],
)
def test_adapter_refusal_of_what_vllm_does_not_implement(changes, words):
    """Each in one sentence with what to do."""
    found = adapter_refusal(ADAPTER_CONFIG | changes, NAMES)
    assert words in found.message
    assert found.remedy


@pytest.mark.parametrize("config", [None, [], "x", 3])
def test_adapter_refusal_of_no_object(config):
    """Whatever a repository holds."""
    assert "no JSON object" in adapter_refusal(config, NAMES).message


def test_adapter_refusal_of_pickles():
    """They can run code."""
    names = {"adapter_config.json", "adapter_model.bin"}
    assert "can run code" in adapter_refusal(ADAPTER_CONFIG, names).message


def test_model_files_of_an_adapter():
    """A whole model beside it wins."""
    sizes = {name: len(content) for name, content in adapter_files().items()}
    assert weights_entry(sizes) == "adapter_model.safetensors"
    assert model_files(sizes, "adapter_model.safetensors", None) == [
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert weights_entry({*sizes, "model.safetensors"}) == "model.safetensors"


def write(directory, files):
    for name, content in files.items():
        (directory / name).write_bytes(content)


def test_check_adapter_returns_the_largest_rank(tmp_path):
    """Of the whole and of single modules."""
    write(tmp_path, adapter_files(rank_pattern={"k_proj": 32}))
    assert check_adapter(tmp_path) == 32


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_check_adapter_refuses_damage(tmp_path, name):
    """Cut files, missing ones, and no directory at all."""
    write(tmp_path, adapter_files())
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
    with pytest.raises(ModelLoadError):
        check_adapter(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ModelLoadError):
        check_adapter(tmp_path)
    with pytest.raises(ModelLoadError, match="not a directory"):
        check_adapter(tmp_path / "none")


def described(shape, dtype="BF16"):
    return {"dtype": dtype, "shape": list(shape)}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"model.layers.0.self_attn.q_proj.weight": described((8, 8))}, None),
        ({"language_model.model.layers.0.self_attn.q_proj.weight": described((16, 8))}, None),
        ({"model.layers.0.self_attn.q_proj.qweight": described((1, 64), "I32")}, None),
        ({"model.layers.0.self_attn.q_proj.weight": described((8, 4), "U8")}, None),
        ({"model.layers.0.self_attn.q_proj.weight": described((16, 16))}, "the model's is 16 x 16"),
        ({"model.layers.0.attention.wq.weight": described((8, 8))}, "no matrices for a module"),
    ],
)
def test_check_adapter_compares_it_with_its_model(tmp_path, tensors, words):
    """By the place within a layer; of quantised weights the place alone."""
    write(tmp_path, adapter_files())
    if words is None:
        assert check_adapter(tmp_path, tensors) == 8
        return
    with pytest.raises(ModelLoadError, match="for another model") as caught:
        check_adapter(tmp_path, tensors)
    assert words in caught.value.message


def test_check_adapter_compares_matrices_with_the_rank(tmp_path):
    """More rows than the config says would be written beyond their room."""
    write(tmp_path, adapter_files(r=4))
    with pytest.raises(ModelLoadError, match="not of rank 4"):
        check_adapter(tmp_path)


def test_check_adapter_bounds_its_config(tmp_path):
    """Nothing of a stranger's is read without a limit."""
    write(tmp_path, adapter_files())
    config = json.dumps(ADAPTER_CONFIG | {"x": "y" * (5 << 20)})
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ModelLoadError, match="more than"):
        check_adapter(tmp_path)
