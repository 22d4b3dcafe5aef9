"""What a node runs to hand out its files; a small module, because a fresh worker imports it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

CHUNK_BYTES = 8 << 20


def read_chunks(blobs: str, wanted: Sequence[tuple[str, int]]) -> Iterator[bytes]:
    """Read files from an offset to their end, one after the other; no chunk holds two files.

    Args:
        blobs: the folder of files on this node.
        wanted: name and first byte of each.

    Raises:
        OSError: a file is not here any more.
    """
    for name, start in wanted:
        with (Path(blobs) / name).open("rb") as stream:
            stream.seek(start)
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
