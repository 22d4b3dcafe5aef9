"""Compile the CPU forward for this machine's processor, once, and call it.

The C++ has no dependency but OpenMP, whose runtime torch has loaded already, so compiling
takes seconds and works wherever a C++ compiler is. The result is kept in the user's cache
under a name that differs by source, compiler and processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("forward.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
# For a kernel that keeps AMX's registers to itself.
WITHOUT_AMX = ("-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")
COMPILE_TIMEOUT_S = 120
# Rows of a workspace behind its last one that AMX's tiles may read, whatever stands there.
SPARE_ROWS = 16


class Unavailable(Exception):
    """The library cannot be made here; the message says why."""


LAYER_WEIGHTS = (
    "qkv", "qkv_bias", "out", "gate_up", "down", "attention_norm", "mlp_norm", "query_norm",
    "key_norm",
)  # fmt: skip


class Layer(ctypes.Structure):
    """`struct Layer` of forward.cpp: addresses of one layer's packed weights and cache."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in (*LAYER_WEIGHTS, "cache")),
        ("window", ctypes.c_int32),
    )  # fmt: skip


class Model(ctypes.Structure):
    """`struct Model` of forward.cpp."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in (
            "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "rotary",
            "vocabulary", "blocks", "threads",
        )),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("embedding", "head", "norm", "cos", "sin")),
    )  # fmt: skip


class Step(ctypes.Structure):
    """`struct Step` of forward.cpp: the packed batch, its workspace and its result."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("tokens", "spans", "kept")),
        *((name, ctypes.c_void_p) for name in (
            "ids", "positions", "slots", "span", "keep", "x", "normed", "qkv", "query",
            "attended", "inner", "logits",
        )),
    )  # fmt: skip


def load(*flags: str) -> ctypes.CDLL:
    """Return the library, compiled now or before.

    Args:
        flags: more of the compiler's, after `-march=native`.

    Raises:
        Unavailable: no compiler, or it fails; one sentence.
    """
    library = _load(flags)
    return library if library.prepare_forward() else _load((*flags, *WITHOUT_AMX))


def kernel_of(library: ctypes.CDLL) -> str:
    """Return which instructions multiply bfloat16, as `amx_bf16` or `avx512_bf16`."""
    name: bytes = library.forward_kernel()
    return name.decode()


def _load(flags: tuple[str, ...]) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise Unavailable("no C++ compiler was found (g++ or clang++, or $CXX)")
    path = _cache() / f"forward-{_fingerprint(compiler, flags)}.so"
    if not path.is_file():
        _compile(compiler, flags, path)
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise Unavailable(f"the compiled library does not load: {error}") from None
    for name in ("forward_float32", "forward_bfloat16"):
        function = getattr(library, name)
        function.argtypes = (ctypes.POINTER(Model), ctypes.POINTER(Step))
        function.restype = None
    library.pack_panels.argtypes = (
        *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32),
    )
    library.pack_panels.restype = None
    library.forward_kernel.restype = ctypes.c_char_p
    return library


def _cache() -> Path:
    """Return a directory that nobody else can write to: what lies there is run."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "serve-app"
    path = root / "native"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and os.access(path, os.W_OK):
            return path
    except OSError:  # a read-only or missing home
        pass
    return Path(tempfile.mkdtemp(prefix="serve-app-native-"))


def _fingerprint(compiler: str, flags: tuple[str, ...]) -> str:
    digest = hashlib.sha256(SOURCE.read_bytes())
    for part in (*FLAGS, *flags, compiler, _run(compiler, "--version"), _processor()):
        digest.update(part.encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Return what `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _compile(compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile beside the target and rename: several replicas of a node may start at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as directory:
        made = Path(directory) / path.name
        _run(compiler, *FLAGS, *flags, "-o", str(made), str(SOURCE))
        made.rename(path)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 (the compiler that the machine's owner installed)
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise Unavailable(f"{command[0]} failed: {lines[0]}")
    return done.stdout
