"""The config to vLLM's engine arguments; needs vLLM, and starts nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from serve_app.cli.main import main
from serve_app.config import EngineConfig, ModelConfig
from serve_app.config.vllm_arguments import OWNED
from serve_app.errors import ConfigError

pytestmark = pytest.mark.vllm
vllm = pytest.importorskip("vllm", reason="vllm is not installed")

from serve_app.engine.vllm import arguments, environment  # noqa: E402
from serve_app.engine.vllm.adapters import Loras  # noqa: E402

MODEL = ModelConfig(path="/m", dtype="float32")
NONE = Loras()


def made(num_gpus=0.0, *, window=4096, splits_thoughts=False, loras=NONE, **engine):
    return arguments.engine_arguments(
        Path("/m"),
        MODEL,
        EngineConfig(backend="vllm", **engine),
        num_gpus=num_gpus,
        window=window,
        splits_thoughts=splits_thoughts,
        loras=loras,
    )


def test_arguments_on_a_cpu_compute_prompts_whole():
    """In a cache of the size that is asked for."""
    found = made(kv_cache_cpu_gib=0.5, max_batch_tokens=512, max_running_requests=7)
    assert found.model == "/m"
    assert found.dtype == "float32"
    assert (found.max_model_len, found.max_num_batched_tokens) == (4096, 4096)
    assert found.enable_chunked_prefill is False
    assert found.kv_cache_memory_bytes == 2**29
    assert found.max_num_seqs == 7
    assert (found.trust_remote_code, found.hf_token, found.load_format) == (
        False,
        None,
        "safetensors",
    )


def test_arguments_of_adapters_have_room_for_the_largest():
    """Of vLLM's steps of ranks; without adapters nothing is set."""
    assert made().enable_lora is False
    loras = Loras({str(number): object() for number in range(9)}, rank=20)
    found = made(loras=loras)
    assert (found.enable_lora, found.max_lora_rank) == (True, 32)
    assert (found.max_loras, found.max_cpu_loras) == (8, 9)
    assert made(loras=loras, vllm={"max_loras": 2}).max_loras == 2


def test_arguments_of_gpus_are_tensor_parallel_and_a_share_is_a_share():
    """One, several, or a part of one."""
    four = made(4, max_batch_tokens=1024, prefill_chunk_tokens=256, speculative_tokens=3)
    assert (four.tensor_parallel_size, four.distributed_executor_backend) == (4, "mp")
    assert four.max_num_batched_tokens == 1024
    assert four.long_prefill_token_threshold == 256
    assert four.speculative_config["num_speculative_tokens"] == 3
    half = made(0.5, kv_cache_fraction=0.8)
    assert (half.tensor_parallel_size, half.gpu_memory_utilization) == (1, 0.4)


def test_arguments_of_ones_own_win_and_unknown_ones_are_named():
    """By vLLM's own names, with the nearest that it has; a value of no sense is told as well."""
    assert made(vllm={"enforce_eager": True, "block_size": 64}).block_size == 64
    assert made(splits_thoughts=True).structured_outputs_config["reasoning_parser"]
    with pytest.raises(ConfigError, match="did you mean enforce_eager"):
        made(vllm={"enforce_eagre": True})
    with pytest.raises(ConfigError, match="vLLM does not take it"):
        made(vllm={"compilation_config": {"nonsense": 1}})


def test_arguments_that_are_owned_are_all_vllms():
    """A name that vLLM has dropped protects nothing."""
    with pytest.raises(ConfigError):
        arguments.check_names({"no_such_thing": 1})
    arguments.check_names(OWNED)


def test_validate_asks_the_vllm_that_is_here(tmp_path, capsys):
    """The command names the application's key; exit 2."""
    args = {"model": {"repo_id": "a/b"}, "engine": {"backend": "vllm", "vllm": {"blok_size": 1}}}
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    assert main(["validate", str(path)]) == 2
    assert "args.engine.vllm.blok_size" in capsys.readouterr().err
    args["engine"]["vllm"] = {"block_size": 16}
    path.write_text(yaml.safe_dump({"applications": [app]}))
    assert main(["validate", str(path)]) == 0
    assert "not installed" not in capsys.readouterr().out


def test_for_children_is_offline_and_has_no_token(monkeypatch):
    """This process keeps both as they were."""
    monkeypatch.setenv("HF_TOKEN", "a secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with environment.for_children({"OMP_NUM_THREADS": "3"}, without=("HF_TOKEN",)):
        assert "HF_TOKEN" not in os.environ
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["HF_TOKEN"] == "a secret"
    assert "HF_HUB_OFFLINE" not in os.environ


def test_vllm_imported_leaves_log_handlers_alone():
    """By itself it closes all that are there, Serve's file of the replica among them."""
    script = (
        "import logging; handler = logging.StreamHandler(); logger = logging.getLogger('vllm')\n"
        "for each in (logger, logging.getLogger()): each.addHandler(handler)\n"
        "import serve_app.engine.vllm.engine\n"
        "print(logger.handlers == logging.getLogger().handlers == [handler])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "True"
