"""vLLM, in an environment of its own: its requirements exclude this product's.

Where that environment has zentorch and the processor is one of AMD's, vLLM computes with it.
"""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from pathlib import Path

from scripts.bench.worker import Run, Setup, bound_cores
from scripts.bench.workload import Request, Stream

# Read when vLLM is imported. By itself it leaves one core of a machine to others, takes half the
# memory and logs every request.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", bound_cores(os.cpu_count() or 1))
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm
from vllm import EngineArgs, SamplingParams
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine


def settings(setup: Setup, _start: str) -> str:
    """Say what is set; all else is its default."""
    on_cpu = f", one process, VLLM_CPU_OMP_THREADS_BIND={os.environ['VLLM_CPU_OMP_THREADS_BIND']}"
    if current_platform.is_zen_cpu():
        on_cpu += f", zentorch {version('zentorch')}"
    if preloaded := os.environ.get("LD_PRELOAD"):
        on_cpu += f", preloaded {', '.join(Path(path).name for path in preloaded.split(':'))}"
    return (
        f"vLLM {vllm.__version__}, max_num_seqs {setup.streams}, max_model_len {setup.window}, "
        f"no prefix caching{on_cpu if setup.device == 'cpu' else ''}"
    )


def load(setup: Setup) -> Run:
    """Load it with room for the requests."""
    on_cpu = setup.device == "cpu"
    if on_cpu:  # by itself it has three processes, which wait for a core half of the time on two
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=setup.model_dir,
            dtype=setup.dtype,
            max_model_len=setup.window,
            max_num_seqs=setup.streams,
            enable_prefix_caching=False,  # every round has the same prompts
            distributed_executor_backend="uni" if on_cpu else None,
            gpu_memory_utilization=0.3 if setup.device == "cuda" else 0.9,
        )
    )
    runs = 0

    def run(requests: list[Request]) -> list[Stream]:
        nonlocal runs
        runs += 1
        began = time.perf_counter()
        streams = {}
        for index, request in enumerate(requests):
            name = f"{runs}-{index}"
            sampling = SamplingParams(temperature=0, max_tokens=request.max_tokens, ignore_eos=True)
            engine.add_request(name, {"prompt_token_ids": list(request.prompt)}, sampling)
            streams[name] = Stream([], [])
        while engine.has_unfinished_requests():
            for output in engine.step():
                stream = streams[output.request_id]
                new = list(output.outputs[0].token_ids)[len(stream.ids) :]
                stream.ids.extend(new)
                stream.times.extend([time.perf_counter() - began] * len(new))
        return list(streams.values())

    return run
