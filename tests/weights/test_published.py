"""Repositories as their authors publish them, through gate, plan, download and load.

What the engine cannot load is refused by the gate, before a byte of weights; what it can load is
fetched without the copies and checkpoints beside it, and loads.
"""

import json
import shutil

import pytest

from scripts.local_hub import LocalHub, Repo
from serve_app.access.hub.probe import check_here
from serve_app.access.preflight import check_this_machine
from serve_app.access.verdict import Outcome
from serve_app.checkpoint.runnable import Loader
from serve_app.config import AppConfig, ModelConfig
from serve_app.engine.model.loading import load
from serve_app.errors import ModelLoadError
from serve_app.weights.fetch import fetch, lacking_bytes
from tests.access.cases import access
from tests.models import make_model

REPO = "acme/published"
MODEL = ModelConfig(repo_id=REPO, dtype="float32")
LOADER = Loader(dtype="float32")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("sound") / "m")


@pytest.fixture
def directory(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "published")


def edit(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


class Published:
    """One repository on the loopback Hub, and what each step says of it."""

    def __init__(self, hub, tmp_path):
        self.hub = hub
        self.config = access(hub, tmp_path, hub.issue_token())
        self.commit = hub.commits()[REPO]["main"]

    def gate(self, loader=LOADER):
        return check_here(MODEL, self.config, loader=loader)

    def plan(self):
        return lacking_bytes(MODEL, self.config, self.commit)

    def fetch(self):
        return fetch(MODEL, self.config, self.commit)

    def weight_bytes_sent(self):
        return sum(e.bytes_sent for e in self.hub.log if e.origin == "cdn" and e.method == "GET")


@pytest.fixture
def publish(directory, tmp_path):
    """Serve the directory as it is by then."""
    hubs = []

    def start():
        hub = LocalHub([Repo.from_dir(REPO, directory)])
        hubs.append(hub)
        hub.start()
        return Published(hub, tmp_path)

    yield start
    for hub in hubs:
        hub.stop()


def refused(published):
    """The gate says no, in one sentence, and no byte of the weights has moved."""
    verdict = published.gate()
    assert verdict.outcome is Outcome.WEIGHTS_MISSING
    assert published.weight_bytes_sent() == 0
    assert verdict.http_status is None
    assert "\n" not in verdict.hub_message
    assert len(verdict.hub_message) < 200
    pinned = check_here(MODEL, published.config, commit=published.commit, loader=LOADER)
    assert pinned.outcome is Outcome.WEIGHTS_MISSING  # a replica, which starts without the gate
    # Another engine's affair: the access itself is proven.
    assert published.gate(loader=None).outcome is Outcome.GRANTED
    return verdict


def served(published):
    """Everything goes through, and the model computes."""
    assert published.gate().outcome is Outcome.GRANTED
    planned = published.plan()
    fetched = published.fetch()
    assert planned == fetched.hub_bytes
    assert published.plan() == 0
    found = fetched.directory
    files = [path for path in found.rglob("*") if path.is_file()]
    blobs = {path.resolve(): path.stat().st_size for path in files}
    assert fetched.hub_bytes + fetched.cache_bytes == sum(blobs.values())
    loaded = load(found, MODEL, num_gpus=0, num_cpus=1)
    assert loaded.vocab_size > 0
    return {path.relative_to(found).as_posix() for path in files}


def test_published_plain_repository_serves(publish):
    """The baseline."""
    assert {WEIGHTS, "config.json", "tokenizer.json"} <= served(publish())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
        ({"architectures": ["MllamaForConditionalGeneration"], "model_type": "mllama",
          "vision_config": {}}, "images"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5",
          "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["FooForCausalLM"], "model_type": "foo", "auto_map": {}}, "foo"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "mamba"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_published_that_the_engine_cannot_load_is_refused_before_the_weights(
    publish, directory, changes, words
):
    """In one sentence of the gate; a directory of the same content is refused in the same words."""
    edit(directory, **changes)
    assert words in refused(publish()).hub_message
    local = check_here(ModelConfig(path=str(directory)), access_of_nobody(), loader=LOADER)
    assert local.outcome is Outcome.WEIGHTS_MISSING
    assert words in local.hub_message
    with pytest.raises(ModelLoadError, match=words.replace("-", ".")):
        load(directory, MODEL, num_gpus=0, num_cpus=1)


def access_of_nobody():
    return AppConfig.model_validate({"model": {"path": "/x"}}).access


def test_published_that_does_not_fit_is_refused(publish, monkeypatch):
    """By the node's own memory, known before the download."""
    published = publish()
    size = 10 * 2**20
    monkeypatch.setattr("serve_app.access.capacity.memory_bytes", lambda: size)
    assert published.gate().outcome is Outcome.GRANTED
    monkeypatch.setattr("serve_app.access.capacity.memory_bytes", lambda: 10_000)
    verdict = published.gate()
    assert verdict.outcome is Outcome.WEIGHTS_MISSING
    assert "GiB of memory" in verdict.hub_message
    assert "smaller model" in verdict.remedy
    assert published.weight_bytes_sent() <= 9  # of the first gate


def test_check_says_that_published_weights_cannot_be_loaded(
    publish, tmp_path, monkeypatch, directory
):
    """`serve-app check` on this machine: exit 3, with the remedy of this fault."""
    edit(directory, quantization_config={"quant_method": "fp8"})
    published = publish()
    args = {
        "model": {"repo_id": REPO},
        "access": {"endpoint": published.hub.url, "token_file": published.config.token_file},
        "replica": {"num_gpus": 0},
    }
    verdict = check_this_machine(AppConfig.model_validate(args))
    assert verdict.exit_code == 3
    table = verdict.table()
    assert "Found: the weights are quantised (fp8)" in table
    assert "Choose a checkpoint of this model in bfloat16" in " ".join(table.split())


def test_fetch_leaves_checkpoints_and_copies_on_the_hub(publish, directory):
    """The bytes of the plan are those of the model."""
    plain = served(publish())
    for copy in ("checkpoint-500", "fp16", "sub/original"):
        shutil.copytree(directory, directory / copy, ignore=shutil.ignore_patterns("*"))
        for name in (WEIGHTS, "config.json"):
            shutil.copy(directory / name, directory / copy / name)
    shutil.copy(directory / WEIGHTS, directory / "consolidated.safetensors")
    shutil.copy(directory / WEIGHTS, directory / "model.fp16.safetensors")
    (directory / "runs" / "a").mkdir(parents=True)
    (directory / "runs" / "a" / "trainer_state.json").write_text("{}" * 9999)
    (directory / "trainer_state.json").write_text("{}" * 9999)
    assert served(publish()) == plain


def test_fetch_prefers_the_whole_file_to_a_stale_index(publish, directory):
    """Left over from a conversion; transformers takes the file, and so does every step."""
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (directory / INDEX).write_text(json.dumps(index))
    assert INDEX not in served(publish())


@pytest.mark.parametrize("is_whole_there", [False, True])
def test_fetch_takes_one_of_two_copies_of_the_weights(publish, directory, is_whole_there):
    """Shards and the whole file: the file. Shards and others: those that the index names."""
    whole = (directory / WEIGHTS).read_bytes()
    shard(directory)
    if is_whole_there:
        (directory / WEIGHTS).write_bytes(whole)
    (directory / "model-00009-of-00009.safetensors").write_bytes(whole)
    weights = {name for name in served(publish()) if name.endswith((".safetensors", ".index.json"))}
    assert weights == ({WEIGHTS} if is_whole_there else {"a.safetensors", "b.safetensors", INDEX})


def shard(directory):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, part in parts.items():
        chosen = {key: tensors[key] for key in part}
        save_file(chosen, directory / name, {"format": "pt"})
    weight_map = {key: name for name, part in parts.items() for key in part}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / INDEX).write_text(json.dumps(index))
    (directory / WEIGHTS).unlink()


def test_fetch_takes_the_file_that_config_json_names(publish, directory):
    """`transformers_weights`: as transformers does it."""
    (directory / WEIGHTS).rename(directory / "main.safetensors")
    edit(directory, transformers_weights="main.safetensors")
    assert "main.safetensors" in served(publish())


def test_published_with_tokenizer_model_alone_is_refused(publish, directory):
    """What transformers would need for it is said before the download, and is right."""
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    verdict = refused(publish())
    assert "sentencepiece is not installed" in verdict.hub_message
    assert "tokenizer.json" in verdict.remedy
    assert "pip install sentencepiece" in verdict.remedy


def test_published_without_any_tokenizer_is_refused(publish, directory):
    """Base weights of a conversion."""
    (directory / "tokenizer.json").unlink()
    assert "tokenizer.json" in refused(publish()).hub_message


def test_load_makes_a_tokenizer_of_vocabulary_and_merges(publish, directory, monkeypatch):
    """Repositories of before 2020, and Qwen's."""
    tokenizer_json = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps(tokenizer_json["vocab"]))
    merges = [
        " ".join(each) if isinstance(each, list) else each for each in tokenizer_json["merges"]
    ]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (directory / "tokenizer.json").unlink()
    edit(directory, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    published = publish()
    assert published.gate().outcome is Outcome.GRANTED
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(published.fetch().directory, local_files_only=True)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"
