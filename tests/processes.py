"""Processes of this machine, as /proc lists them."""

from pathlib import Path


def children_of(pid: int, name: str) -> list[int]:
    """Return the children of a process whose names begin so."""
    children = [
        child
        for listed in Path(f"/proc/{pid}/task").glob("*/children")
        for child in listed.read_text().split()
    ]
    names = {int(child): Path(f"/proc/{child}/comm").read_text() for child in children}
    return [child for child, comm in names.items() if comm.startswith(name)]
