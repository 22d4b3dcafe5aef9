"""Loading: what is right is reported, what is wrong gets one sentence."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

from serve_app.config import ModelConfig
from serve_app.engine.model.loading import load
from serve_app.errors import InvalidRequest, ModelLoadError
from serve_app.protocol import ChatPrompt
from tests.engine.conftest import load_engine, run
from tests.models import VOCAB, WINDOW, make_model, make_tokenizer


@pytest.fixture
def copy(model_dir, tmp_path):
    """A tiny Llama's directory that may be damaged."""
    return shutil.copytree(model_dir("llama"), tmp_path / "model")


def load_here(directory, *, dtype="float32", num_gpus=0):
    return load(
        directory, ModelConfig(path=str(directory), dtype=dtype), num_gpus=num_gpus, num_cpus=2.5
    )


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def shard(directory):
    """Turn one weight file into two with an index."""
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file, {"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").unlink()


def test_load_takes_the_tokenizers_end_as_an_end(copy):
    """Fine-tunes keep their base model's config and teach another end, as a chat template shows."""
    edit(copy / "generation_config.json", eos_token_id=5)
    edit(copy / "config.json", eos_token_id=5)
    assert load_here(copy).eos_token_ids == {5, 0}
    edit(copy / "tokenizer_config.json", eos_token="<|start|>", eot_token="<|end|>")
    assert load_here(copy).eos_token_ids == {5, 1, 0}
    edit(copy / "tokenizer_config.json", eos_token=None, eot_token=None)
    assert load_here(copy).eos_token_ids == {5}


def test_load_takes_no_end_outside_of_the_vocabulary(copy):
    """No token could ever be sampled as it."""
    edit(copy / "generation_config.json", eos_token_id=[0, VOCAB, -1])
    assert load_here(copy).eos_token_ids == {0}


def test_load_reads_sampling_defaults(copy):
    """What the authors publish beside the ends."""
    assert load_here(copy).defaults == {}
    edit(copy / "generation_config.json", temperature=0.6, top_p=0.9, max_new_tokens=7)
    assert load_here(copy).defaults == {"temperature": 0.6, "top_p": 0.9}


def with_template(copy, path):
    config = ModelConfig(path=str(copy), dtype="float32", chat_template=str(path))
    return load(copy, config, num_gpus=0, num_cpus=1).tokenizer.chat_template


def test_load_replaces_the_models_chat_template(copy, tmp_path, monkeypatch):
    """Of any path, also one from the home directory or where the replica runs."""
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages | length }} messages, ü", encoding="utf-8")
    assert with_template(copy, path) == "{{ messages | length }} messages, ü"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_template(copy, "~/own.jinja").endswith("ü")
    monkeypatch.chdir(tmp_path)
    assert with_template(copy, "own.jinja").endswith("ü")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read on this node: No such file or directory.*on every node"),
        (b"\xff\xfe", "not UTF-8"),
        (b" \n", "is empty"),
        (b"a\n{% if %}", "no chat template: line 2"),
        (b"{{ messages | nonsense }}", "No filter named 'nonsense'"),
    ],
)
def test_load_stops_at_a_chat_template_that_is_none(copy, tmp_path, content, words):
    """In one sentence that names the key and the file."""
    path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelLoadError, match=rf"model\.chat_template: {path}.*{words}"):
        with_template(copy, path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_gives_every_parameter_the_asked_dtype(copy, dtype):
    """The dtype is the config's, not the file's."""
    loaded = load_here(copy, dtype=dtype)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, dtype)}
    assert not loaded.model.training


def test_load_learns_window_vocabulary_ends_and_layers(copy):
    """Window, vocabulary, ends and layers come from the model; threads from the replica."""
    edit(copy / "generation_config.json", eos_token_id=[0, 9])
    edit(copy / "config.json", eos_token_id=7)
    loaded = load_here(copy)
    assert loaded.window == WINDOW
    assert loaded.vocab_size == VOCAB
    assert loaded.eos_token_ids == {0, 9, 7}
    assert loaded.weights_bytes == sum(4 * p.numel() for p in loaded.model.parameters())
    assert torch.get_num_threads() == 2


def test_load_keeps_a_rope_that_depends_on_the_batch_in_its_trained_window(tmp_path):
    """Beyond it a neighbour's length would change a request's tokens."""
    rope = {
        "rope_type": "dynamic",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    directory = make_model(tmp_path / "m", "llama", rope_parameters=rope)
    assert load_here(directory).window == 128


def test_load_reads_shards_and_names_a_missing_one(copy):
    """An index names its shards; each must be there before anything is read."""
    shard(copy)
    assert load_here(copy).vocab_size == VOCAB
    (copy / "b.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"b\.safetensors is missing"):
        load_here(copy)


def test_load_names_a_damaged_index(copy):
    """A cut index is not a Python error."""
    shard(copy)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": [')
    with pytest.raises(ModelLoadError, match=r"index\.json is damaged"):
        load_here(copy)


@pytest.mark.parametrize("keep", [0, 5, 100, -50])
def test_load_names_a_cut_or_overwritten_weight_file(copy, keep):
    """Header or data cut off: the file's name, not a parser's words alone."""
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep] if keep else b"\xff" * 64)
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is damaged"):
        load_here(copy)


def test_load_refuses_pickled_weights(copy):
    """Formats that can run code are not loaded, even when they are all there is."""
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="no safetensors"):
        load_here(copy)


def test_load_names_an_absent_tensor(copy):
    """Transformers would fill it with random numbers and warn."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"lack 1 .*layers\.1\.mlp\.up_proj"):
        load_here(copy)


def test_load_refuses_a_tensor_of_another_shape(copy):
    """Weights of another size of the model."""
    edit(copy / "config.json", intermediate_size=48)
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_here(copy)


def test_load_does_not_run_the_repositorys_own_code(copy):
    """`auto_map` points at code of the repository; it stays unread."""
    edit(
        copy / "config.json",
        model_type="own-kind",
        auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    )
    (copy / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelLoadError, match="cannot be loaded"):
        load_here(copy)


def test_load_says_that_a_directory_has_no_model(tmp_path):
    """No config.json is the first thing seen."""
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load_here(tmp_path)


def test_load_says_that_a_tokenizer_is_missing(copy):
    """Weights alone cannot answer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ModelLoadError, match=r"[Tt]okenizer"):
        load_here(copy)


@pytest.mark.parametrize("kind", ["bloom", "mamba"])
def test_load_refuses_architectures_without_the_interface(tmp_path, kind):
    """Attention of their own, or none: named, not computed wrongly."""
    if kind == "bloom":
        model = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    else:
        model = MambaForCausalLM(
            MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4)
        )
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=type(model).__name__):
        load_here(tmp_path)


def test_load_refuses_other_kinds_of_layers(copy):
    """A layer that keeps something else than K and V of all or the last tokens."""
    edit(copy / "config.json", layer_types=["full_attention", "linear_attention", "full_attention"])
    with pytest.raises(ModelLoadError, match="linear_attention"):
        load_here(copy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_load_says_that_a_gpu_is_not_there(copy):
    """The config asks for a GPU, torch sees none: what to check, and how to do without."""
    with pytest.raises(ModelLoadError, match=r"num_gpus.*no CUDA device"):
        load_here(copy, num_gpus=1)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_load_fails_the_warm_up_of_weights_that_give_no_numbers(copy, poison):
    """NaN or infinite logits are seen before the first request."""
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = poison
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match="not a number"):
        load_engine(copy)


def test_load_fails_the_warm_up_of_a_model_that_says_nothing(copy):
    """Only special tokens: an empty text is not an answer."""
    tensors = load_file(copy / "model.safetensors")
    head = torch.zeros_like(tensors["lm_head.weight"])
    tensors["lm_head.weight"] = head  # all logits equal: always id 0, the end
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match="empty text"):
        load_engine(copy)


async def test_load_takes_a_model_without_a_chat_template(copy):
    """Completions work; a conversation is refused with the reason."""
    (copy / "chat_template.jinja").unlink()
    engine = load_engine(copy)
    try:
        assert (await run(engine, [5, 6, 7]))[1]
        with pytest.raises(InvalidRequest, match="no chat template"):
            await run(engine, ChatPrompt(({"role": "user", "content": "Hello"},)))
    finally:
        engine.close()


def test_load_reports_time_and_size_by_phase(load):
    """Flat facts for one log line, phases that add up."""
    engine = load("llama", dtype="bfloat16")
    report = engine.load_report
    facts = report.facts()
    assert facts["dtype"] == "bfloat16"
    assert facts["device"] == "cpu"
    assert facts["attention"] == "native"
    assert facts["kv_bytes"] == facts["kv_tokens"] * 480
    phases = ("weights_s", "tokenizer_s", "assemble_s", "graphs_s", "warm_up_s")
    assert all(facts[phase] >= 0 for phase in phases)
    assert report.total_s == pytest.approx(sum(getattr(report, phase) for phase in phases))
    assert facts["load_s"] == round(report.total_s, 3)
    peaks = [facts[f"peak_rss_{phase}_bytes"] for phase in ("load", "assemble", "warm_up")]
    assert peaks == sorted(peaks)
    assert peaks[0] > 50 * 2**20
