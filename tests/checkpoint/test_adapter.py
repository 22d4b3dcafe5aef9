"""Which adapters vLLM can serve, by what their repositories say."""

import json

import pytest

from serve_app.checkpoint.adapter import adapter_refusal, check_adapter
from serve_app.checkpoint.files import model_files, weights_entry
from serve_app.errors import ModelLoadError
from tests.access.cases import ADAPTER_CONFIG, adapter_files
from tests.conftest import safetensors

NAMES = set(adapter_files())


def test_adapter_refusal_of_a_plain_adapter():
    """PEFT's defaults, written out as PEFT does it."""
    written = {
        "bias": "none", "use_dora": False, "modules_to_save": None, "layer_replication": None,
        "init_lora_weights": True, "rank_pattern": {"k_proj": 4}, "alpha_pattern": {},
    }  # fmt: skip
    patterns = {r"^model\.layers\.[0-3]\.q_proj$": 8, ".*down_proj": 0.5}
    assert adapter_refusal(ADAPTER_CONFIG | {"alpha_pattern": patterns}, NAMES) is None
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
        ({"rank_pattern": ["q_proj"]}, "rank_pattern that is no object"),
        ({"rank_pattern": {str(n): 8 for n in range(5000)}}, "rank_pattern that is no object"),
        ({"rank_pattern": {"(x+x+)+y": 8}}, "rank_pattern with an expression that is refused"),
        ({"alpha_pattern": {".*.*.*_proj": 8}}, "alpha_pattern with an expression that is refused"),
        ({"alpha_pattern": {"q_proj[": 8}}, "alpha_pattern with an expression that is none"),
        ({"alpha_pattern": {"q_proj": "8"}}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"lora_alpha": "16"}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"bias": "all"}, "bias"),
        ({"bias": None}, "bias"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
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


def test_adapter_refusal_of_no_target_modules():
    """The key is wanted by vLLM, whatever it says."""
    config = {key: value for key, value in ADAPTER_CONFIG.items() if key != "target_modules"}
    assert "no target_modules" in adapter_refusal(config, NAMES).message


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


Q = "model.layers.0.self_attn.q_proj"


def matrices(module, a, b, *, halves=("lora_A.weight", "lora_B.weight")):
    return {f"base_model.model.{module}.{half}": s for half, s in zip(halves, (a, b), strict=True)}


EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
OWN_EMBEDDING = "base_model.model.model.embed_tokens.base_layer.weight"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({f"{Q}.weight": described((24, 16))}, None),
        (
            {f"language_{Q}.weight": described((24, 16)), f"vision.{Q}.weight": described((3, 5))},
            None,
        ),
        ({f"{Q}.weight": described((24, 16), "F8_E4M3")}, None),
        ({f"{Q}.qweight": described((1, 64), "I32")}, None),
        ({f"{Q}.weight": described((24, 8), "U8")}, None),
        ({f"{Q}.weight": described((16, 16))}, "is 24 x 16 there, the model's is 16 x 16"),
        ({f"{Q}.weight": described((16, 24))}, "is 24 x 16 there, the model's is 16 x 24"),
        ({f"{Q}.weight": described((24, 32))}, "is 24 x 16 there, the model's is 24 x 32"),
        ({"model.layers.0.attention.wq.weight": described((24, 16))}, "no matrices for a module"),
        ({"model.layers.1.self_attn.q_proj.weight": described((24, 16))}, "no such layer"),
    ],
)
def test_check_adapter_compares_it_with_its_model(tmp_path, model, words):
    """By the place within a layer, with both sides; of quantised weights the place alone."""
    write(tmp_path, adapter_files())
    weights = safetensors(matrices(Q, [8, 16], [24, 8]))
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    if words is None:
        assert check_adapter(tmp_path, model) == 8
        return
    with pytest.raises(ModelLoadError, match="for another model") as caught:
        check_adapter(tmp_path, model)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("tensors", "changes", "words"),
    [
        (matrices("model.embed_tokens", [8, 64], [16, 8], halves=EMBEDDING), {}, None),
        (matrices("model.embed_tokens", [8, 16], [64, 8], halves=EMBEDDING), {}, "16 x 64 there"),
        (matrices("lm_head", [8, 16], [64, 8]) | {OWN_EMBEDDING: [64, 16]}, {}, None),
        (matrices("lm_head", [8, 16], [64, 8]) | {OWN_EMBEDDING: [65, 16]}, {}, "65 x 16 there"),
        (matrices("lm_head", [8, 64], [16, 8]), {"fan_in_fan_out": True}, None),
        (matrices("lm_head", [8, 16], [64, 8]), {"fan_in_fan_out": True}, "16 x 64 there"),
    ],
)
def test_check_adapter_compares_what_is_stored_the_other_way(tmp_path, tensors, changes, words):
    """An embedding's rows are what comes in; GPT-2's linear layers are stored like one."""
    write(tmp_path, adapter_files(**changes))
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    sides = described((64, 16))
    model = {"model.embed_tokens.weight": sides, "lm_head.weight": sides}
    if words is None:
        assert check_adapter(tmp_path, model) == 8
        return
    with pytest.raises(ModelLoadError) as caught:
        check_adapter(tmp_path, model)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("tensors", "changes", "words"),
    [
        (matrices(Q, [8, 16], [8, 8]), {"r": 4}, "not of rank 4"),
        (matrices(Q, [8, 16], [8, 8]), {"r": 16}, "not of rank 16"),
        (matrices(Q, [8, 16], [8, 4]), {"rank_pattern": {"k": 4}}, "not of rank 4 or 8"),
        (matrices(Q, [8, 16, 1], [8, 8]), {}, "not of rank 8"),
        (matrices(Q, [], []), {}, "not of rank 8"),
        ({f"base_model.model.{Q}.lora_A.weight": [8, 16]}, {}, "without its other half"),
        (matrices(Q, [8, 16], [8, 8]) | {f"base_model.model.{Q}.bias": [8]}, {}, "no LoRA matrix"),
        (matrices(Q, [8, 16], [8, 8]) | {"base_model.model.lm_head.weight": [8]}, {}, "no LoRA m"),
        (
            matrices(Q, [8, 16], [8, 8], halves=("lora_A.default.weight", "lora_B.default.weight")),
            {},
            "no LoRA matrix",
        ),
        (matrices("x" * 600, [8, 16], [8, 8]), {}, "no LoRA matrix"),
    ],
)
def test_check_adapter_refuses_what_is_no_pair_of_its_rank(tmp_path, tensors, changes, words):
    """Some end vLLM, with others it answers nonsense."""
    write(tmp_path, adapter_files(**changes))
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors(tensors))
    with pytest.raises(ModelLoadError) as caught:
        check_adapter(tmp_path)
    assert words in caught.value.message


def test_check_adapter_refuses_integers(tmp_path):
    """They would be taken as if they were numbers of a training."""
    write(tmp_path, adapter_files())
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"BF16"', b'"I16" '))
    with pytest.raises(ModelLoadError, match="no floating-point"):
        check_adapter(tmp_path)


def test_check_adapter_bounds_its_config(tmp_path):
    """Nothing of a stranger's is read without a limit."""
    write(tmp_path, adapter_files())
    config = json.dumps(ADAPTER_CONFIG | {"x": "y" * (5 << 20)})
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(ModelLoadError, match="more than"):
        check_adapter(tmp_path)
