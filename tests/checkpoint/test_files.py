"""Which files are the model: transformers' rule, compared with transformers itself elsewhere."""

import json

import pytest

from serve_app.checkpoint import files
from serve_app.checkpoint.files import INDEX, SINGLE, Index, model_files, parse_index, weights_entry
from serve_app.errors import ModelLoadError

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index(*shards, **more):
    weight_map = {f"w{number}": shard for number, shard in enumerate(shards)}
    return json.dumps({"metadata": {"total_size": 64}, "weight_map": weight_map} | more).encode()


@pytest.mark.parametrize(
    ("names", "config", "entry"),
    [
        ([SINGLE], {}, SINGLE),
        ([INDEX, *SHARDS], {}, INDEX),
        ([SINGLE, INDEX, *SHARDS], {}, SINGLE),
        (["model.fp16.safetensors"], {}, None),
        (["checkpoint-5/model.safetensors"], {}, None),
        (["pytorch_model.bin"], {}, None),
        ([SINGLE], {"transformers_weights": "other.safetensors"}, "other.safetensors"),
        ([], {"transformers_weights": "x.safetensors.index.json"}, "x.safetensors.index.json"),
        ([SINGLE], None, SINGLE),
    ],
)
def test_weights_entry_prefers_the_single_file_to_an_index(names, config, entry):
    """And config.json over both, as in transformers."""
    assert weights_entry(names, config) == entry


@pytest.mark.parametrize("named", ["../x.safetensors", "/x.safetensors", "x.bin", "", 1, [], {}])
def test_weights_entry_lets_config_json_name_not_just_anything(named):
    """A file of the repository, in the one format."""
    with pytest.raises(ModelLoadError, match="transformers_weights"):
        weights_entry([SINGLE], {"transformers_weights": named})


LISTING = {
    "README.md": 10, ".gitattributes": 10, "config.json": 10, "generation_config.json": 10,
    "tokenizer.json": 10, "tokenizer_config.json": 10, "tokenizer.model": 10, "merges.txt": 10,
    "chat_template.jinja": 10, "additional_chat_templates/rag.jinja": 10, "LICENSE": 10,
    "USE_POLICY.md": 10, SINGLE: 100, INDEX: 10, SHARDS[0]: 50, SHARDS[1]: 50,
    "model.fp16.safetensors": 50, "consolidated.safetensors": 100, "pytorch_model.bin": 100,
    "pytorch_model.bin.index.json": 10, "checkpoint-500/model.safetensors": 100,
    "checkpoint-500/config.json": 10, "fp16/model-00001-of-00002.safetensors": 50,
    "original/params.json": 10, "runs/a/trainer_state.json": 10, "trainer_state.json": 10,
    "sub/original/model.safetensors": 100, "onnx/config.json": 10, "modeling_x.py": 10,
    "adapter_model.safetensors": 10, "eval_results.json": 1 << 30, "x.gguf": 100,
}  # fmt: skip
SMALL = {
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "tokenizer.model", "merges.txt", "chat_template.jinja", "additional_chat_templates/rag.jinja",
    "LICENSE", "USE_POLICY.md",
}  # fmt: skip


def test_model_files_are_the_weights_and_the_small_files_at_the_top():
    """No checkpoints of the training, no copies, no other formats, nothing huge beside it."""
    assert set(model_files(LISTING, SINGLE, None)) == SMALL | {SINGLE}
    sharded = model_files(LISTING, INDEX, Index(SHARDS))
    assert set(sharded) == SMALL | {INDEX, *SHARDS}
    assert sharded == sorted(sharded)


def test_model_files_in_a_folder_if_the_index_names_them():
    """Transformers joins the names."""
    listing = {"config.json": 1, INDEX: 1, "weights/a.safetensors": 1, "weights/b.safetensors": 1}
    chosen = model_files(listing, INDEX, Index(("weights/a.safetensors",)))
    assert chosen == ["config.json", INDEX, "weights/a.safetensors"]


def test_model_files_names_a_shard_that_is_not_listed():
    """Before anything is fetched."""
    with pytest.raises(ModelLoadError, match=SHARDS[1]):
        model_files({INDEX: 1, SHARDS[0]: 1}, INDEX, Index(SHARDS))


@pytest.mark.parametrize(
    ("name", "limit"),
    [("config.json", files.CONFIG_BYTES), ("tokenizer.json", files.TOKENIZER_BYTES),
     ("chat_template.jinja", files.TEMPLATE_BYTES), ("tokenizer_config.json", files.SMALL_BYTES)],
)  # fmt: skip
def test_model_files_bounds_what_is_read_whole(name, limit):
    """What the model needs is refused over it, what it does not need is left out."""
    assert name in model_files({SINGLE: 1, name: limit}, SINGLE, None)
    with pytest.raises(ModelLoadError, match=name):
        model_files({SINGLE: 1, name: limit + 1}, SINGLE, None)
    assert model_files({SINGLE: 1, "notes.json": 1 << 40}, SINGLE, None) == [SINGLE]
    assert files.size_limit(SINGLE) is None


def test_parse_index_with_its_size():
    """Each shard once, in order."""
    parsed = parse_index(index(SHARDS[1], SHARDS[0], SHARDS[1]))
    assert (parsed.shards, parsed.total_bytes, parsed.has_metadata) == (SHARDS, 64, True)


@pytest.mark.parametrize(
    ("metadata", "total"),
    [({"total_size": 5.0}, 5), ({"total_size": "5"}, None), ({"total_size": -1}, None),
     ({"total_size": 1e999}, None), ({}, None), (None, None), ("x", None)],
)  # fmt: skip
def test_parse_index_treats_the_size_as_a_hint(metadata, total):
    """Nonsense is no size."""
    parsed = parse_index(index("a.safetensors", metadata=metadata))
    assert parsed.total_bytes == total
    assert parsed.has_metadata is isinstance(metadata, dict)


@pytest.mark.parametrize(
    "raw",
    [b"", b"x", b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": {}}', b"[" * 100_000,
     index("../x.safetensors"), index("/x.safetensors"), index("x.bin"), index("x\0.safetensors"),
     b'{"weight_map": {"a": 7}}', b'{"weight_map": {"a": ["x"]}}', b"9" * 10_000, b"\xff"],
    ids=lambda raw: repr(raw[:30]),
)  # fmt: skip
def test_parse_index_refuses_what_is_none_in_one_sentence(raw):
    """Cut, nested without end, or naming what lies elsewhere."""
    with pytest.raises(ModelLoadError, match=INDEX):
        parse_index(raw)


def test_read_limited_reads_up_to_its_limit(tmp_path):
    """One byte more, and it is refused unread; none at all is empty."""
    (tmp_path / "a.json").write_bytes(b"12345")
    assert files.read_limited(tmp_path / "a.json", 5) == b"12345"
    assert files.read_limited(tmp_path / "none.json", 5) == b""
    with pytest.raises(ModelLoadError, match=r"a\.json has more than 4 bytes"):
        files.read_limited(tmp_path / "a.json", 4)
