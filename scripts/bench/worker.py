"""A contender in a process of its own: both ends of the pipe to it.

The benchmark starts every contender once and lets them take turns. Between its turns a
process is stopped (SIGSTOP, with its children), so that no spinning thread of one contender
takes time from another. Imports nothing but the standard library: the far end runs in the
peers' own environments.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scripts.bench.workload import Request, Stream

ROOT = Path(__file__).parents[2]
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class ContenderFailed(RuntimeError):
    """A contender ended; what it said is in its log."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What a contender needs to load the model.

    Args:
        model_dir: config, tokenizer and safetensors.
        dtype: bfloat16 or float32.
        device: cpu or cuda.
        threads: of one step on the CPU.
        streams: requests at once at the most.
        window: tokens of the longest request.
        gguf: the same weights for llama.cpp.
    """

    model_dir: str
    dtype: str
    device: str
    threads: int
    streams: int
    window: int
    gguf: str


Run = Callable[[list[Request]], Any]


class Contender:
    """The benchmark's end: a process that runs requests when it is its turn.

    Args:
        name: for the report and the log.
        start: `module:function` of `scripts.bench.contenders`.
        python: the interpreter of the contender's environment.
        setup: what it loads.
        log: where its output goes.
        preload: libraries that are loaded before all others.
    """

    def __init__(
        self,
        name: str,
        start: str,
        python: str,
        setup: Setup,
        log: Path,
        preload: Sequence[Path] = (),
    ) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [python, "-m", "scripts.bench.worker", start, json.dumps(asdict(setup))],
                cwd=ROOT,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | preloading(preload),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                start_new_session=True,
            )
        try:
            loaded = self._answer()
            self.load_s: float = loaded["load_s"]
            self.settings: str = loaded["settings"]
            self._signal(signal.SIGSTOP)
        except BaseException:
            self.close()
            raise

    def run(self, requests: list[Request], *, together: bool = True) -> dict[str, Any]:
        """Let it run requests at once or one after the other; others are stopped meanwhile.

        Returns:
            `results`, one for all or one for each, `peak_bytes` of its processes, and `waited`,
            the share of the time in which something on the machine waited for a core: much more
            than in other rounds means that others disturbed this one.

        Raises:
            ContenderFailed: it ended.
        """
        waited_s, began = waited(), time.monotonic()
        self._signal(signal.SIGCONT)
        batches = [requests] if together else [[request] for request in requests]
        task = [[asdict(request) for request in batch] for batch in batches]
        assert self._process.stdin is not None  # noqa: S101 (a pipe was asked for)
        try:
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ContenderFailed(f"{self.name} ended; see {self._log}") from None
        answer = self._answer()
        self._signal(signal.SIGSTOP)
        answer["waited"] = (waited() - waited_s) / (time.monotonic() - began)
        return answer

    def close(self) -> None:
        """End it and its children."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None  # noqa: S101 (a pipe was asked for)
        line = self._process.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)  # it may be writing to its log why
            raise ContenderFailed(f"{self.name} failed; see {self._log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            if number != signal.SIGKILL:
                raise ContenderFailed(f"{self.name} ended; see {self._log}") from None


def bound_cores(threads: int) -> str:
    """Return the cores of this process's threads as a list of CPU numbers: `0-1`, or `0,2`."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if cores == list(range(cores[0], cores[0] + len(cores))):
        return f"{cores[0]}-{cores[-1]}"
    return ",".join(map(str, cores))


def preloading(libraries: Sequence[Path]) -> dict[str, str]:
    """Return what of an environment has the dynamic linker load libraries before all others."""
    return {"LD_PRELOAD": ":".join(map(str, libraries))} if libraries else {}


def recommended_by_vllm(python: str) -> list[Path]:
    """Return what vLLM's guide for CPUs wants preloaded, of what there is: tcmalloc, libiomp5."""
    wanted = [
        *sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4")),
        Path(python).parent.parent / "lib" / "libiomp5.so",
    ]
    return [path.absolute() for path in wanted if path.exists()]


def waited() -> float:
    """Return the seconds since boot in which something waited for a core; 0 if unknown."""
    try:
        some = Path("/proc/pressure/cpu").read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return 0.0
    return int(some.rsplit("total=", 1)[1]) / 1e6


def serve(start: str, setup: Setup) -> None:
    """The contender's end: load, then run what comes in until the pipe closes."""
    # Whoever waits for its turn is stopped and would outlive a benchmark that is killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)  # what libraries print belongs in the log
        module, function = start.split(":")
        began = time.perf_counter()
        contender = importlib.import_module(f"scripts.bench.contenders.{module}")
        run: Run = getattr(contender, function)(setup)
        loaded = {
            "load_s": time.perf_counter() - began,
            "settings": contender.settings(setup, function),
        }
        print(json.dumps(loaded), file=answers, flush=True)
        for line in sys.stdin:
            batches = [[Request(**request) for request in batch] for batch in json.loads(line)]
            results = [run(batch) for batch in batches]
            answer = {"results": results, "peak_bytes": peak_bytes(os.getpid())}
            print(json.dumps(answer, default=_plain), file=answers, flush=True)


def peak_bytes(pid: int) -> int:
    """Return the largest resident sizes of a process and its children; shared pages count twice."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text(encoding="ascii").split()
        ]
    except OSError:  # it ended meanwhile
        return 0
    fields = dict(line.split(":", 1) for line in status.splitlines())
    own = int(fields.get("VmHWM", "0 kB").split()[0]) * 1024
    return own + sum(map(peak_bytes, children))


def _plain(value: object) -> object:
    if isinstance(value, Stream):
        return asdict(value)
    raise TypeError(type(value).__name__)


if __name__ == "__main__":
    serve(sys.argv[1], Setup(**json.loads(sys.argv[2])))
    os._exit(0)  # a contender's threads need not end by themselves
