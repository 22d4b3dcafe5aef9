"""What a node can hold, as far as it is known."""

import pytest

from serve_app.access import capacity
from serve_app.access.capacity import GIB, gpu_bytes, memory_bytes, room_fault
from serve_app.checkpoint.runnable import Loader


def test_memory_bytes_of_this_machine():
    """More than nothing, less than a petabyte."""
    assert 1 << 28 < memory_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("content", "limit"), [("1073741824\n", GIB), ("max\n", None), ("", None), (str(2**62), None)]
)
def test_memory_bytes_within_a_containers_limit(tmp_path, monkeypatch, content, limit):
    """It is what the kernel kills by."""
    (tmp_path / "memory.max").write_text(content)
    monkeypatch.setattr(capacity, "_LIMITS", (str(tmp_path / "memory.max"), "/none"))
    monkeypatch.setattr(capacity.os, "sysconf", lambda name: 1 << 20)
    assert memory_bytes() == (limit or 1 << 40)


@pytest.mark.parametrize(
    ("printed", "largest"),
    [
        ("81559\n", 81559 << 20),
        ("24576\n81559\n24576\n", 81559 << 20),
        ("[N/A]\n", None),
        ("", None),
    ],
)
def test_gpu_bytes_of_the_largest_gpu(tmp_path, monkeypatch, printed, largest):
    """Of the driver's own tool, which needs no library and no torch."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(capacity.shutil, "which", lambda _: str(tool))
    assert gpu_bytes() == largest


@pytest.mark.parametrize("script", ["exit 9", "sleep 30", None])
def test_gpu_bytes_are_not_known_when_the_driver_does_not_answer(tmp_path, monkeypatch, script):
    """Then nothing is refused."""
    tool = tmp_path / "nvidia-smi"
    if script:
        tool.write_text(
            f"#!/bin/sh\nexec {script}\n" if "sleep" in script else f"#!/bin/sh\n{script}\n"
        )
        tool.chmod(0o755)
    monkeypatch.setattr(capacity, "SMI_TIMEOUT_S", 0.5)
    monkeypatch.setattr(capacity.shutil, "which", lambda _: str(tool) if script else None)
    assert gpu_bytes() is None
    assert room_fault(1 << 60, Loader(num_gpus=1)) is None


@pytest.mark.parametrize(
    ("num_gpus", "needed_gib", "fits"),
    [
        (1, 79, True),
        (1, 81, False),
        (2, 150, True),
        (2, 161, False),
        (0.5, 79, True),
        (0.5, 81, False),
    ],
)
def test_room_fault_refuses_only_what_can_never_fit(monkeypatch, num_gpus, needed_gib, fits):
    """The weights alone are larger than all the GPUs of a replica."""
    monkeypatch.setattr(capacity, "gpu_bytes", lambda: 80 * GIB)
    found = room_fault(needed_gib * GIB, Loader(num_gpus=num_gpus))
    assert (found is None) is fits
    assert fits or "replica.num_gpus" in found.remedy


def test_room_fault_on_a_cpu_counts_its_memory(monkeypatch):
    """In the dtype of the config."""
    monkeypatch.setattr(capacity, "memory_bytes", lambda: 8 * GIB)
    assert room_fault(8 * GIB, Loader(dtype="float32")) is None
    found = room_fault(9 * GIB, Loader(dtype="float32"))
    assert "9.0 GiB in float32" in found.message
    assert "8.0 GiB of memory" in found.message
