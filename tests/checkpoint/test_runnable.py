"""What an engine can load, by config.json and the names of the files."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.checkpoint import runnable
from serve_app.checkpoint.architectures import RUNS
from serve_app.checkpoint.runnable import Loader, refusal, weights_bytes

NAMES = {"config.json", "tokenizer.json", "model.safetensors"}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
BUILTIN = Loader()


def refused(config, names=NAMES, installed=()):
    return refusal(config, names, BUILTIN, installed=lambda package: package in installed)


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        {"model_type": "llama"},
        LLAMA | {"architectures": ["LLaMAForCausalLM"]},
        LLAMA | {"architectures": None},
        LLAMA | {"quantization_config": None},
        LLAMA | {"auto_map": {"AutoModel": "own.M"}},
        LLAMA | {"num_key_value_heads": None, "head_dim": None},
        {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "sliding_window": None},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 12},
        {"model_type": "gemma3n_text", "intermediate_size": [64, 64]},
        {"model_type": "mistral", "architectures": ["MistralModel"], "tie_word_embeddings": True},
        {"model_type": "olmo2", "layer_types": ["full_attention", "sliding_attention"]},
        {"model_type": "phi3", "torch_dtype": "float16", "num_parameters": 10**12},
    ],
    ids=str,
)
def test_refusal_of_dense_text_decoders_is_none(config):
    """With the odd entries that published configs have."""
    assert refused(config) is None


@pytest.mark.parametrize(
    ("quantisation", "method"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4"}, "compressed-tensors"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_algo": "NVFP4"}, "NVFP4"),
        ({"bits": 4, "group_size": 64}, "4 bits"),
        ({"x": 1}, "unknown method"),
        ("fp8", "unknown method"),
        ({"quant_method": "x\n\x1b[2J" + "y" * 500}, "x??"),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_refusal_of_quantised_weights_by_method(quantisation, method, key):
    """Whichever tool made them, wherever it says so; with what to do instead."""
    for config in (LLAMA | {key: quantisation}, LLAMA | {"text_config": {key: quantisation}}):
        found = refused(config)
        assert method in found.message
        assert "engine.backend builtin" in found.message
        assert "bfloat16" in found.remedy
        assert found.message.isprintable()
        assert len(found.message) < 200


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (LLAMA | {"dtype": "float8_e4m3fn"}, NAMES),
        (LLAMA | {"torch_dtype": "torch.float8_e5m2", "dtype": None}, NAMES),
        (LLAMA | {"dtype": "int8"}, NAMES),
        (LLAMA, NAMES | {"hf_quant_config.json"}),
        (LLAMA, NAMES | {"quantize_config.json"}),
        (LLAMA, NAMES | {"quant_config.json"}),
    ],
)
def test_refusal_of_other_signs_of_quantised_weights(config, names):
    """A dtype, or the file that a tool leaves."""
    assert "quantised" in refused(config, names).message


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mllama", "architectures": ["MllamaForConditionalGeneration"],
          "vision_config": {}, "text_config": {}}, "images, audio or video"),
        ({"model_type": "gemma3", "vision_config": {}}, "images, audio or video"),
        ({"model_type": "llama4", "vision_config": {}}, "images, audio or video"),
        ({"model_type": "qwen2_5_vl", "vision_config": {}}, "images, audio or video"),
        ({"model_type": "qwen2_audio", "audio_config": {}}, "images, audio or video"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "mamba"}, "no text-only decoder"),
        ({"model_type": "bloom"}, "no text-only decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no text-only decoder"),
        ({"model_type": "lfm2"}, "no text-only decoder"),
        ({"model_type": "deepseek_v32"}, "no text-only decoder"),
        ({"model_type": "own-kind", "auto_map": {"AutoConfig": "x.C"}}, "no text-only decoder"),
        ({"model_type": ""}, "no text-only decoder"),
        ({"architectures": ["LlamaForCausalLM"]}, "no model_type"),
        ({"model_type": 7}, "no model_type"),
        ({}, "no model_type"),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, "no head"),
        (LLAMA | {"architectures": ["LlamaModel"], "tie_word_embeddings": False}, "no head"),
        (LLAMA | {"is_encoder_decoder": True}, "encoder-decoder"),
        (LLAMA | {"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        (LLAMA | {"layer_types": [["x"]]}, "layers of kind"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_refusal_of_other_models_by_kind(config, words):
    """Each with what is served instead."""
    found = refused(config)
    assert words in found.message
    assert "text-only decoder" in found.remedy


@pytest.mark.parametrize("config", [None, [], "x", 7, True])
def test_refusal_of_what_is_no_config(config):
    """By every engine."""
    assert "no JSON object" in refused(config).message
    assert refusal(config, NAMES, Loader("vllm")) is not None


def test_refusal_of_another_engine_has_rules_of_its_own():
    """What the builtin one refuses, vLLM loads."""
    for config in (
        LLAMA | {"quantization_config": {"quant_method": "fp8"}},
        {"model_type": "mllama"},
    ):
        assert refused(config) is not None
        assert refusal(config, NAMES, Loader("vllm")) is None


@pytest.mark.parametrize(
    "key",
    ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "head_dim",
     "intermediate_size", "max_position_embeddings", "n_layer", "num_labels", "n_routed_experts"],
)  # fmt: skip
@pytest.mark.parametrize(
    "value", [-1, 2**40, 10**30, 1.5, float("nan"), float("inf"), "9", {}, True]
)
def test_refusal_of_numbers_that_no_model_has(key, value):
    """Modules, tables and labels of that size would be made before a weight is looked at."""
    assert key in refused(LLAMA | {key: value}).message


@pytest.mark.parametrize("version", ["5.24.0", "5.24.1.dev0", "6.0"])
def test_refusal_leaves_more_to_a_newer_transformers(monkeypatch, version):
    """Then what is not in the table is left to loading; what is known to fail is not."""
    monkeypatch.setattr(runnable, "version", lambda _: version)
    assert refused({"model_type": "brand-new"}) is None
    assert refused({"model_type": "lfm2"}) is not None
    assert refused({"model_type": "brand-new", "vision_config": {}}) is not None
    monkeypatch.setattr(runnable, "version", lambda _: "5.23.9")
    assert refused({"model_type": "brand-new"}) is not None


@pytest.mark.parametrize(
    ("names", "installed", "words"),
    [
        ({"tokenizer.json"}, (), None),
        ({"vocab.json", "merges.txt"}, (), None),
        ({"tokenizer.model"}, (), "sentencepiece is not installed"),
        ({"tokenizer.model"}, ("sentencepiece",), None),
        ({"tokenizer.model", "tokenizer.json"}, (), None),
        ({"tekken.json"}, (), "mistral-common is not installed"),
        ({"tekken.json"}, ("mistral_common",), None),
        ({"tiktoken.model"}, (), "tiktoken is not installed"),
        ({"vocab.json"}, (), "no tokenizer.json"),
        (set(), (), "no tokenizer.json"),
    ],
)
def test_refusal_of_a_tokenizer_that_needs_what_is_not_here(names, installed, words):
    """tokenizer.model needs a package that nobody has by default: said before the download."""
    found = refused(LLAMA, {"config.json", "model.safetensors"} | names, installed)
    assert (found is None) if words is None else (words in found.message)
    assert found is None or "tokenizer.json" in found.remedy


@pytest.mark.parametrize(
    ("stored", "held", "factor"),
    [("bfloat16", "bfloat16", 1), ("float16", "bfloat16", 1), ("float32", "bfloat16", 0.5),
     ("bfloat16", "float32", 2), ("float32", "float32", 1), (None, "bfloat16", 1),
     (7, "float32", 2)],
)  # fmt: skip
def test_weights_bytes_follow_the_dtype(stored, held, factor):
    """Of the checkpoint, and of the engine."""
    config = LLAMA | {"dtype": stored}
    assert weights_bytes(1000, config, Loader(dtype=held)) == 1000 * factor


@given(
    st.dictionaries(
        st.sampled_from(
            ["model_type", "architectures", "quantization_config", "text_config", "layer_types",
             "dtype", "torch_dtype", "vision_config", "is_encoder_decoder", "hidden_size",
             "num_labels", "tie_word_embeddings"]
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
            | st.sampled_from(sorted(RUNS)),
            lambda inner: st.lists(inner, max_size=3)
            | st.dictionaries(st.text(max_size=8), inner, max_size=3),
            max_leaves=6,
        ),
    )
)  # fmt: skip
def test_refusal_of_any_config_is_none_or_one_sentence(config):
    """Nothing is raised over what a stranger wrote, and nothing of it moves a cursor."""
    found = refused(config)
    if found is not None:
        assert found.message.isprintable()
        assert found.message.isascii()
        assert len(found.message) < 400


def test_refusal_for_vllm_takes_quantised_weights_as_they_are_stored():
    """What it refuses it says itself; numbers that no model has are refused for both."""
    quantised = LLAMA | {"quantization_config": {"quant_method": "fp8"}, "dtype": "bfloat16"}
    loader = Loader(backend="vllm", dtype="auto", num_gpus=4)
    assert refusal(quantised, NAMES, loader) is None
    assert weights_bytes(70 << 30, quantised, loader) == 70 << 30
    assert weights_bytes(70 << 30, quantised, replace(loader, dtype="bfloat16")) == 70 << 30
    assert "no model has" in refusal(LLAMA | {"num_hidden_layers": -1}, NAMES, loader).message
