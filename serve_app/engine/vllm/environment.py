"""What vLLM's processes find in their environment.

Imported before vLLM, which reads some of it once. A variable that the node sets stays as it is,
but for what keeps the gate whole: no process of vLLM's downloads, and none has a token.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    # A fork of a process with threads and an event loop may hang.
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
    # Several replicas on one machine would bind to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
FIXED = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

for _name, _value in DEFAULTS.items():
    os.environ.setdefault(_name, _value)
os.environ["VLLM_NO_USAGE_STATS"] = "1"  # a thread of this process would send them
# Its set-up closes every handler that is there, Serve's files of this replica among them; without
# it warnings and errors of vLLM's go where Python sends them, to stderr.
os.environ["VLLM_CONFIGURE_LOGGING"] = "0"


@contextmanager
def for_children(more: Mapping[str, str], *, without: Collection[str]) -> Iterator[None]:
    """Let processes that start meanwhile be offline; this process keeps its own environment.

    Args:
        more: what else they find.
        without: variables that they do not find, those that may hold a token.
    """
    changed = {**FIXED, **more}
    before = {name: os.environ.get(name) for name in (*changed, *without)}
    os.environ.update(changed)
    for name in without:
        os.environ.pop(name, None)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
