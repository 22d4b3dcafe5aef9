"""What the tests of the gate share: tokens made up at run time, repositories, verdicts."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

from scripts.local_hub import LocalHub
from serve_app.access.verdict import NodeVerdict, Outcome, TokenReport
from serve_app.config import AccessConfig, ModelConfig
from tests.conftest import TINY_REPO, safetensors

COMMIT = "c0ffee" + "0" * 34
MODEL = ModelConfig(repo_id=TINY_REPO)
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}


def fake_token() -> str:
    """Return a value of a token's shape that is none."""
    return "hf_" + secrets.token_hex(17)


def single_files() -> dict[str, bytes | Path]:
    """Return a repository whose weights are one file."""
    return {
        "README.md": b"# single\n",
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors": safetensors({"weight": [64, 8]}),
    }


def sharded_files(*, missing: str | None = None) -> dict[str, bytes | Path]:
    """Return a repository with an index of two shards, one of them perhaps absent."""
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    weight_map = {f"w{i}": shard for i, shard in enumerate(shards)}
    index = {"metadata": {"total_size": 32}, "weight_map": weight_map}
    files: dict[str, bytes | Path] = {
        "config.json": json.dumps(CONFIG).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
    }
    files |= {shard: safetensors({f"w{i}": [8]}) for i, shard in enumerate(shards)}
    return {name: content for name, content in files.items() if name != missing}


ADAPTER_REPO = "acme/adapter"
ADAPTER_CONFIG = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def adapter_files(**changes: object) -> dict[str, bytes | Path]:
    """Return the repository of a LoRA adapter; None takes a key of its config out."""
    config = {k: v for k, v in (ADAPTER_CONFIG | changes).items() if v is not None}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora"
    return {
        "README.md": b"# adapter\n",
        "adapter_config.json": json.dumps(config).encode(),
        "adapter_model.safetensors": safetensors(
            {f"{name}_{half}.weight": [8, 8] for half in "AB"}
        ),
        "tokenizer.json": b"{}",
    }


def access(hub: LocalHub, tmp_path: Path, token: str | None, **limits: float) -> AccessConfig:
    """Return the config of a node that holds this token in a file."""
    if token is None:
        return AccessConfig(endpoint=hub.url, **limits)
    file = tmp_path / "token"
    file.write_text(token)
    return AccessConfig(endpoint=hub.url, token_file=str(file), **limits)


def granted(name: str = "node", commit: str | None = COMMIT, **facts: object) -> NodeVerdict:
    """Return the verdict of a node that may read the weights."""
    return verdict(name, Outcome.GRANTED, commit=commit, **facts)


def verdict(name: str, outcome: Outcome, **facts: object) -> NodeVerdict:
    """Return some verdict of a node."""
    facts = {"token": TokenReport("env:HF_TOKEN", "0123abcd"), **facts}
    return NodeVerdict(f"id-{name}", name, outcome, "do this", **facts)
