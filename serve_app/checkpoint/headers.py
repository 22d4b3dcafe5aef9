"""The header of a safetensors file: read with limits, before any tensor library opens the file.

8 bytes length, little endian; a JSON object of tensors with dtype, shape and the place of their
bytes; the bytes. A stranger wrote it: lengths, numbers and places are checked against the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serve_app.checkpoint.files import parse_json
from serve_app.errors import ModelLoadError

HEADER_BYTES = 32 << 20  # about 250,000 tensors; the format's own limit is 100 MB
MAX_DIMENSIONS = 32
# Bits of one element by the format's name of a dtype.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


def check_weights_file(file: Path) -> dict[str, Any]:
    """Check a file of weights: its header makes sense and its tensors lie within it.

    Returns:
        The tensors by name, each with `dtype`, `shape` and `data_offsets`.

    Raises:
        ModelLoadError: what is wrong, with the file's name.
        OSError: it cannot be read.
    """
    if not file.is_file():
        raise ModelLoadError(f"The weight file {file.name} is missing or unreadable.")
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= size - 8:
            raise _damaged(file, "it is cut off, or no safetensors file")
        if length > HEADER_BYTES:
            raise _damaged(file, f"its header has {length:,} bytes, more than {HEADER_BYTES:,}")
        header = parse_json(stream.read(length))
    if not isinstance(header, dict):
        raise _damaged(file, "it has no readable safetensors header")
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    body = size - 8 - length
    places = sorted(_place(file, name, entry, body) for name, entry in tensors.items())
    end = 0
    for start, stop in places:
        if start < end:
            raise _damaged(file, "its tensors overlap")
        end = stop
    return tensors


def _place(file: Path, name: str, entry: Any, body: int) -> tuple[int, int]:
    """Return where a tensor's bytes begin and end."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _damaged(file, f"{ascii(name)[:80]} has no place in it")
    start, stop = offsets
    if stop > body:
        raise _damaged(file, "it is cut off: its tensors end behind its last byte")
    if not start <= stop or stop - start != _bytes(entry):
        raise _damaged(file, f"{ascii(name)[:80]} has another size than its shape says")
    return start, stop


def _bytes(entry: dict[str, Any]) -> int | None:
    shape, bits = entry.get("shape"), _BITS.get(str(entry.get("dtype")))
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or bits is None:
        return None
    for extent in shape:
        if not _is_size(extent):
            return None
        bits *= extent
    return bits // 8


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**60


def _damaged(file: Path, what: str) -> ModelLoadError:
    return ModelLoadError(
        f"The weight file {file.name} is damaged: {what}; download the model again."
    )
