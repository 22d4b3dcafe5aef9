"""What this node can hold: memory of the machine and of its GPUs, as far as it is known.

Careful on purpose: a model is refused only where its weights alone are larger than all there is.
No torch and no driver library is loaded; `nvidia-smi` answers for the GPUs.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from serve_app.checkpoint.runnable import Loader, Refusal

GIB = 1 << 30
SMI_TIMEOUT_S = 5.0
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_UNLIMITED = 1 << 60


def room_fault(weights_bytes: int, loader: Loader) -> Refusal | None:
    """Return why the weights cannot be held on this node; None if they can, or nobody knows.

    Args:
        weights_bytes: of all tensors, in the dtype that they are held in.
        loader: where they go.
    """
    if loader.num_gpus == 0:
        room, where = memory_bytes(), "memory"
    else:
        gpus = math.ceil(loader.num_gpus)
        largest = gpu_bytes()
        room = None if largest is None else gpus * largest
        where = f"memory on {gpus} GPU{'s' if gpus > 1 else ''}"
    if room is None or weights_bytes <= room:
        return None
    form = "as they are stored" if loader.dtype == "auto" else f"in {loader.dtype}"
    message = (
        f"the weights take {weights_bytes / GIB:.1f} GiB {form}, and this node has "
        f"{room / GIB:.1f} GiB of {where}"
    )
    more = "raise replica.num_gpus" if loader.num_gpus else "give the node more memory"
    return Refusal(message, f"Choose a smaller model, or {more}.")


def memory_bytes() -> int | None:
    """Return the memory of this machine, or of its container if that has less; None if unknown."""
    known = [size for path in _LIMITS if (size := _number(path)) is not None and size < _UNLIMITED]
    with suppress(OSError, ValueError):
        known.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min((size for size in known if size > 0), default=None)


def gpu_bytes() -> int | None:
    """Return the memory of this node's largest GPU; None if it is not known."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(  # noqa: S603 (an absolute path and constants)
            asked, capture_output=True, timeout=SMI_TIMEOUT_S, check=True, text=True
        ).stdout
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return max(
        (int(size) << 20 for size in re.findall(r"(?m)^\s*(\d+)\s*$", printed)), default=None
    )


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError):  # `max` is no number either
        return None
