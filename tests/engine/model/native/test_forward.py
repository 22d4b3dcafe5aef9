"""The CPU's own forward against transformers', and against itself in other company."""

import ctypes
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from serve_app.engine.cache.allocator import Region
from serve_app.engine.cache.prefix_cache import Holding
from serve_app.engine.model.native import library
from serve_app.engine.model.native.forward import NativeForward
from serve_app.engine.model.native.weights import COLUMNS, Packer, take, unsupported
from serve_app.engine.sequence import Move, Row, Sequence
from tests.engine.invariance import PLACES, assert_invariant, sequence

pytestmark = pytest.mark.slow

SIZES = {
    "vocab_size": 203,
    "hidden_size": 72,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
KINDS = {
    "llama": {"model_type": "llama", "head_dim": 12},
    "wide-heads": {"model_type": "llama", "head_dim": 80, "num_attention_heads": 2},
    "tied": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 6},
    "window": {"model_type": "mistral", "sliding_window": 40, "head_dim": 32},
    "no-window": {"model_type": "llama", "sliding_window": 5},
    "short-window": {"model_type": "mistral", "sliding_window": 5, "head_dim": 32},
    "biased": {"model_type": "qwen2", "num_key_value_heads": 1},
    "normed-heads": {"model_type": "qwen3", "head_dim": 32},
}


def make(kind: str, dtype: torch.dtype):
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**SIZES, **KINDS[kind]})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():  # nothing stays at its neutral value
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def make_native(kind: str, dtype: torch.dtype, flags=(), **sizes) -> NativeForward:
    model = make(kind, dtype)
    assert unsupported(model) is None
    sizes = {"kv_tokens": 2048, "max_batch_tokens": 512, **sizes}
    compiled = library.load(*flags)
    return NativeForward(compiled, take(compiled, model, 256), **sizes)


# What processors without this one's best instructions run; each is a build of its own.
KERNELS = {
    "amx_bf16, emulated": (
        *library.WITHOUT_AMX,
        "-include",
        str(Path(__file__).with_name("tiles.h")),
    ),
    "avx512": (*library.WITHOUT_AMX, "-mno-avx512bf16"),
    "vectors of 8": (*library.WITHOUT_AMX, "-mno-avx512f"),
}


def prompts(*lengths: int) -> list[Sequence]:
    rng = random.Random(1)
    return [
        sequence([rng.randrange(SIZES["vocab_size"]) for _ in range(length)], 256 * index)
        for index, length in enumerate(lengths)
    ]


@torch.inference_mode()
def reference(model, some: Sequence) -> torch.Tensor:
    return model(torch.tensor([some.tokens])).logits[0].float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_native_step_equals_transformers(kind, dtype):
    """Logits of every token of mixed prompts in one step, within the dtype's rounding."""
    some = prompts(1, 33, 130, 7, 64)
    got = make_native(kind, dtype).logits([Row(s, 0, len(s.tokens), len(s.tokens)) for s in some])
    model = make(kind, torch.float32)
    if dtype is torch.bfloat16:  # the same rounded weights, but exact sums
        model = make(kind, dtype).float()
    want = torch.cat([reference(model, s) for s in some])
    tolerance = 2e-4 if dtype is torch.float32 else 0.06
    assert (got - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_result_is_bitwise_the_same_in_any_company_and_any_chunks(dtype):
    """A hundred sequences alone, then in random batches, chunks and places."""
    forward = make_native("window", dtype, kv_tokens=100 * PLACES)
    assert_invariant(forward, SIZES["vocab_size"], 100)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["llama", "wide-heads", "window"])
def test_native_kernels_all_compute_the_same_model(kernel, kind):
    """Those of other processors too: near the exact sums, and bitwise in any company."""
    flags = KERNELS[kernel]
    assert library.kernel_of(library.load(*flags)) == kernel.partition(",")[0]
    some = prompts(1, 33, 130, 7, 64, 17)
    forward = make_native(kind, torch.bfloat16, flags)
    got = forward.logits([Row(s, 0, len(s.tokens), len(s.tokens)) for s in some])
    model = make(kind, torch.bfloat16).float()
    want = torch.cat([reference(model, s) for s in some])
    assert (got - want).abs().max() < 0.06 * want.abs().max()
    assert_invariant(
        make_native(kind, torch.bfloat16, flags, kv_tokens=20 * PLACES), SIZES["vocab_size"], 20
    )


@pytest.mark.parametrize("target", ["sapphirerapids", "cooperlake", "icelake-server", "haswell"])
def test_native_compiles_for_every_class_of_processor(target, tmp_path):
    """AMX, AVX512-BF16, AVX-512 and AVX2, whatever this machine is."""
    compiler = os.environ.get("CXX", "g++")
    made = tmp_path / "forward.so"
    flags = [flag for flag in library.FLAGS if not flag.startswith("-march")]
    subprocess.run(
        [compiler, *flags, f"-march={target}", "-o", str(made), str(library.SOURCE)], check=True
    )
    code = subprocess.run(
        ["objdump", "-d", str(made)], check=True, capture_output=True, text=True
    ).stdout
    assert ("tdpbf16ps" in code) == (target == "sapphirerapids")
    assert ("vdpbf16ps" in code) == (target in ("sapphirerapids", "cooperlake"))
    assert ("zmm" in code) == (target != "haswell")


def test_native_threads_do_not_change_a_bit():
    """One thread or two: work is divided between results, never inside one."""
    forward = make_native("llama", torch.bfloat16)
    some = prompts(50, 3)
    rows = [Row(s, 0, len(s.tokens), 1) for s in some]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = forward.logits(rows)
        torch.set_num_threads(2)
        assert torch.equal(forward.logits(rows), one)
    finally:
        torch.set_num_threads(threads)


def test_native_sequence_that_was_moved_goes_on():
    """K and V are copied block by block; the last one is not whole."""
    forward = make_native("llama", torch.float32)
    (some,) = prompts(77)
    forward.logits([Row(some, 0, 76, 0)])
    stayed = forward.logits([Row(some, 76, 1, 1)])
    forward.move((Move(0, 1024, 76),))
    some.holding = Holding(Region(1024, 256))
    assert torch.equal(forward.logits([Row(some, 76, 1, 1)]), stayed)


def test_native_ignores_what_an_earlier_sequence_left_behind():
    """Not even NaN: a poisoned request's place is clean for the next one."""
    forward = make_native("llama", torch.bfloat16)
    (some,) = prompts(70)
    clean = forward.logits([Row(some, 0, 70, 1)])
    forward._cache.fill_(float("nan"))
    assert torch.equal(forward.logits([Row(some, 0, 70, 1)]), clean)


def test_native_poison_stays_in_its_row():
    """A row that is not a number does not touch its neighbours."""
    forward = make_native("llama", torch.bfloat16)
    some = prompts(40, 40)
    rows = [Row(s, 0, 40, 1) for s in some]
    clean = forward.logits(rows)
    forward.logits([Row(s, 0, 39, 0) for s in some])
    forward._cache[:, :, :8].fill_(float("nan"))  # the first sequence's place
    got = forward.logits([Row(s, 39, 1, 1) for s in some])
    assert got[0].isnan().all()
    assert torch.equal(got[1], clean[1])


@pytest.mark.parametrize("inputs", [10, 128, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pack_is_a_permutation(dtype, inputs):
    """Panel, pair of inputs, column, input: every weight stands where the kernel reads it."""
    weight = torch.randn(70, inputs).to(dtype)
    depth = 2 if dtype is torch.bfloat16 else 1
    packed = Packer(library.load()).pack(weight).view(3, inputs // depth, COLUMNS, depth)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 26)).view(3, COLUMNS, -1, depth)
    assert torch.equal(packed, padded.transpose(1, 2))


def test_pack_joins_matrices():
    """One after the other, or some outputs of each by turns, wherever they lie in memory."""
    packer = Packer(library.load())
    first, second = torch.randn(64, 100).bfloat16(), torch.randn(100, 64).bfloat16().T
    assert torch.equal(packer.pack(first, second), packer.pack(torch.cat([first, second])))
    turns = torch.stack([first.view(4, 16, 100), second.reshape(4, 16, 100)], dim=1).flatten(0, 2)
    assert torch.equal(packer.pack(first, second, by_turns=16), packer.pack(turns))


def test_unsupported_leaves_unlike_models_alone():
    """An architecture, an activation, a size or a dtype that the kernel does not know."""
    config = AutoConfig.for_model(**SIZES, model_type="llama", hidden_act="gelu")
    assert "gelu" in unsupported(AutoModelForCausalLM.from_config(config))
    config = AutoConfig.for_model(**SIZES, model_type="llama", mlp_bias=True)
    assert "bias" in unsupported(AutoModelForCausalLM.from_config(config))
    config = AutoConfig.for_model(**SIZES, model_type="gemma2")
    assert "gemma2" in unsupported(AutoModelForCausalLM.from_config(config))
    odd = {"hidden_size": 75, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 24}
    config = AutoConfig.for_model(**{**SIZES, **odd}, model_type="llama")
    assert "sizes" in unsupported(AutoModelForCausalLM.from_config(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, model_type="llama"))
    assert "float16" in unsupported(model.half())


def test_load_reports_a_machine_without_a_compiler(monkeypatch, tmp_path):
    """Nothing found, or something that fails: one sentence, no traceback."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    with pytest.raises(library.Unavailable, match="cannot be run"):
        library.load()
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(library.Unavailable, match="failed"):
        library.load()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(library.Unavailable, match="no C\\+\\+ compiler"):
        library.load()


def test_load_compiles_the_library_once_and_only_where_nobody_else_writes(monkeypatch, tmp_path):
    """A second load takes the first one's file; a directory open to others is not used."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert isinstance(library.load(), ctypes.CDLL)
    (made,) = (tmp_path / "serve-app" / "native").iterdir()
    before = made.stat().st_mtime_ns
    library.load()
    assert made.stat().st_mtime_ns == before
    made.parent.chmod(0o777)
    assert library._cache() != made.parent
