"""Memory for what is read from end to end in every step, in pages of 2 MiB where Linux has them.

With pages of 4 KiB a processor looks up an address every 4 KiB, and its prefetchers stop there:
reading a model's weights takes a quarter more time.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

from serve_app.errors import ModelLoadError

REGION = 64 << 20  # bytes asked of the system at a time; what is not used takes no memory
ALIGNMENT = 64  # bytes of a cache line


class HugePages:
    """Gives out memory that lives as long as a tensor in it."""

    def __init__(self) -> None:
        self._region: mmap.mmap | None = None
        self._used = 0

    def empty(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of `count` numbers; what stands there is zero.

        Raises:
            ModelLoadError: the system does not give so much memory.
        """
        size = count * dtype.itemsize
        if self._region is None or self._used + size > len(self._region):
            self._region, self._used = _region(max(REGION, size)), 0
        begin, self._used = self._used, self._used + size + -size % ALIGNMENT
        return torch.frombuffer(self._region, dtype=dtype, count=count, offset=begin)


def _region(size: int) -> mmap.mmap:
    # Private, which is not Python's default: shared memory has rules of its own for them.
    try:
        region = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise ModelLoadError(f"No memory is left for the weights: {error.strerror}.") from error
    # A kernel without them says so; the memory is as good.
    with suppress(OSError, AttributeError):
        region.madvise(mmap.MADV_HUGEPAGE)
    return region
