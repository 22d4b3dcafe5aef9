"""Tensors in memory of our own: apart, aligned, alive for as long as they are held."""

import gc
import mmap
import weakref
from pathlib import Path

import pytest
import torch

from serve_app.engine.model.native import huge_pages
from serve_app.engine.model.native.huge_pages import ALIGNMENT, REGION, HugePages
from serve_app.errors import ModelLoadError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_huge_pages_give_tensors_apart(dtype):
    """Each begins at a cache line and none writes into another, in one region or in the next."""
    memory = HugePages()
    sizes = [3, 1000, REGION // dtype.itemsize // 2, REGION // dtype.itemsize, 5]
    tensors = [memory.empty(size, dtype) for size in sizes]
    for number, (tensor, size) in enumerate(zip(tensors, sizes, strict=True)):
        assert tensor.shape == (size,)
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert not tensor[-1]
        tensor[0] = tensor[-1] = number + 1
    for number, tensor in enumerate(tensors):
        assert tensor[0] == tensor[-1] == number + 1


def test_huge_pages_live_as_long_as_a_tensor_in_them(monkeypatch):
    """And no longer: a model that is closed gives its memory back."""

    class Region(mmap.mmap):
        """One that can be watched."""

    regions = []

    def made(size):
        region = Region(-1, size)
        regions.append(weakref.ref(region))
        return region

    monkeypatch.setattr(huge_pages, "_region", made)
    tensor = HugePages().empty(10, torch.float32)
    gc.collect()
    assert regions[0]() is not None
    tensor[:] = 1
    del tensor
    gc.collect()
    assert regions[0]() is None


def test_huge_pages_without_memory():
    """More than the system has is an error of the model, in words."""
    with pytest.raises(ModelLoadError, match="No memory is left for the weights: "):
        HugePages().empty(1 << 60, torch.float32)


def test_huge_pages_are_asked_for():
    """Where this kernel has them the region is marked; it is memory in any case."""
    tensor = HugePages().empty(REGION // 2, torch.bfloat16)
    tensor.fill_(1)
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert "hg" in _flags_at(tensor.data_ptr()).split()


def _flags_at(address):
    """Return the flags of the mapping of this process that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        name = line.split()[0]
        if not name.endswith(":"):
            first, last = (int(part, 16) for part in name.split("-"))
            inside = first <= address < last
        elif inside and name == "VmFlags:":
            return line.removeprefix(name)
    raise AssertionError("no such mapping")
