"""Fixtures shared by all tests: the loopback Hub and the demo model."""

from __future__ import annotations

import atexit
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import structlog
from _pytest.nodeid import coerce_node_id

from tests.certificates import Certificates, make_certificates

# Before anything imports huggingface_hub, which reads these once: no test sees the token, the
# cache or the settings of whoever runs it, and the list of agents is not asked for on the network.
for _name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
    del os.environ[_name]
_hf_home = tempfile.TemporaryDirectory(prefix="serve-app-tests-")
atexit.register(_hf_home.cleanup)
os.environ["HF_HOME"] = _hf_home.name
(Path(_hf_home.name) / ".agent_harnesses.json").write_text(
    json.dumps({"standardEnvVars": [], "harnesses": {}})
)

# Ray starts a node by fork. gRPC's handlers start its threads again in the child, which may abort
# there before it has become the raylet, or at the end of this process.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

# OpenMP's threads else spin while they wait for each other: with a second process of tests on the
# same cores each of torch's small operations would wait for a turn of the scheduler.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A shell starts what runs in its background with SIGINT ignored, and that is handed down: Ctrl-C
# would do nothing in the programs that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

from scripts.local_hub import LocalHub, Repo  # noqa: E402
from scripts.local_hub.model import build_demo_model, default_cache_dir  # noqa: E402

TINY_REPO = "acme/tiny-llama"

LONG = {
    f"tests/integration/test_{name}.py"
    for name in ("application", "deploy", "gated_app", "going_back", "grants", "hung", "scaling")
}

# A shared machine may stop any test for longer than 200 ms.
hypothesis.settings.register_profile("shared-machine", deadline=None)
hypothesis.settings.load_profile("shared-machine")


def safetensors(tensors: dict[str, list[int]]) -> bytes:
    """Write a safetensors file of bf16 zeros: a true header, little content."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = 2
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + bytes(offset)


def tiny_files() -> dict[str, bytes | Path]:
    """Return a sharded Llama repository of a few KB; its weights cannot answer anything."""
    shards = {
        "model-00001-of-00002.safetensors": {"model.embed_tokens.weight": [64, 8]},
        "model-00002-of-00002.safetensors": {"model.norm.weight": [8], "lm_head.weight": [64, 8]},
    }
    weight_map = {name: shard for shard, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 2064}, "weight_map": weight_map}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 8,
        "dtype": "bfloat16",
    }
    return {
        "README.md": b"# tiny\n",
        "LICENSE.txt": b"A licence to accept.\n",
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{shard: safetensors(tensors) for shard, tensors in shards.items()},
    }


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Let all but the first process of `pytest -n` run the tests that start Ray, file by file.

    Those mostly wait, so the others run beside them, in the first process. A process that has no
    file of its kind left takes one of the others. What takes minutes begins first: it would be all
    that is left to one process when the other has ended.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RayBeside(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.partition("::")[0]

        def _assign_work_unit(self, node: Any) -> None:
            starts_ray = node.gateway.id != "gw0"
            for file in sorted(self.workqueue, key=lambda file: file not in LONG):
                if file.startswith("tests/integration/") == starts_ray:
                    self.workqueue.move_to_end(file, last=False)
                    break
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # which would put files of few tests last
    return RayBeside(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give each test an id of its own, and measure no coverage of those that it would cost much.

    pytest 9.2 gives all of a schema's operations (schemathesis) one id, and of tests with one id
    pytest-xdist runs a single one: those get the id that their name says. Measuring makes Python
    half as slow again: tests that bound a time would fail, and slow ones reach little more.
    """
    for item in items:
        if item.parent is not None and not item.nodeid.endswith(item.name):
            item._id = coerce_node_id(f"{item.parent.nodeid}::{item.name}")
        if config.pluginmanager.hasplugin("_cov"):
            marks = {mark.name for mark in item.iter_markers()}
            if marks & {"timed", "slow"}:
                item.add_marker("no_cover")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Beside tests that start Ray, take no more of the processor than Ray's workers, at nice 15.

    Those that bound how long something may take would measure that, and do not give way.
    """
    if os.environ.get("PYTEST_XDIST_WORKER"):
        first = item.get_closest_marker("cluster") or item.get_closest_marker("timed")
        wanted = 0 if first else 15
        with suppress(PermissionError):  # only root may take more again
            os.setpriority(os.PRIO_PROCESS, 0, wanted)


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[None]:
    """What one test configures of the logs is gone in the next."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def hub() -> Iterator[LocalHub]:
    """A loopback Hub that holds the gated repository `acme/tiny-llama`."""
    with LocalHub([Repo(TINY_REPO, tiny_files())]) as running:
        yield running


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """A certificate for 127.0.0.1 and the authority that signed it, as files."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model's directory: SmolLM2-135M-Instruct in bf16, made once a machine."""
    return build_demo_model(default_cache_dir())


@pytest.fixture
def kv_store(monkeypatch):
    """The cluster's key-value store, without a cluster."""
    from serve_app.cluster import kv
    from tests.fakes import FakeKeyValueStore

    store = FakeKeyValueStore()
    monkeypatch.setattr(kv, "internal_kv", store)
    return store
