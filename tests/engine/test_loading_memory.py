"""What loading takes at its peak, measured in a process of its own."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration.conftest import ROOT
from tests.models import make_model

pytestmark = pytest.mark.slow

LIMIT = 1.2  # of the weights
SCRIPT = """
import json, sys, threading, time
from pathlib import Path
from serve_app.config import EngineConfig, ModelConfig
from serve_app.engine.model.build import assemble
from serve_app.engine.model.loading import load
from serve_app.engine.model.native import library
import transformers.models.llama.modeling_llama  # code is no copy of the weights

def resident():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096

native = sys.argv[2] == "native"
engine = EngineConfig(max_context_tokens=64, max_running_requests=1, native_cpu=native)
library.load()
before, peak, running = resident(), [0], True

def watch():
    while running:
        peak[0] = max(peak[0], resident())
        time.sleep(0.001)

watching = threading.Thread(target=watch)
watching.start()
loaded = load(Path(sys.argv[1]), ModelConfig(path=sys.argv[1]), num_gpus=0, num_cpus=1)
held = loaded.weights_bytes
assembled = assemble(loaded, engine)
running = False
watching.join()
print(json.dumps([(peak[0] - before - assembled.kv_bytes) / held, assembled.attention]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose layers are large beside what a process needs for itself."""
    directory = make_model(
        tmp_path_factory.mktemp("large"),
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=16,
    )
    weights = directory / "model.safetensors"
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    assert sum(tensor.numel() for tensor in tensors.values()) * torch.bfloat16.itemsize > 3e8
    return directory


@pytest.mark.parametrize("forward", ["native", "transformers"])
def test_loading_holds_the_weights_once(model, forward):
    """The peak of resident memory, file pages included, is at most 1.2 x the weights."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), forward],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        timeout=120,
        check=True,
    )
    ratio, attention = json.loads(done.stdout.splitlines()[-1])
    assert (attention == "native") == (forward == "native"), attention
    assert 0.9 < ratio < LIMIT
