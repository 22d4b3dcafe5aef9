"""What the engine, the server and its workers say to each other; plain data, standard library.

engine ──control socket──► server   spawn (with the worker's descriptors), and what to do
with a worker: nice, kill, status
engine ──worker socket───► worker   OPEN, ADVANCE, CLOSE a completion; a reply for each mask
engine ◄─shared memory──── worker   the masks, a slot for each completion
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, dataclass
from typing import Literal

OPEN, ADVANCE, CLOSE = 1, 2, 3
READY, FAULT = 1, 2
COMMAND = struct.Struct("<BIi")  # operation, completion, its slot or the token to go on with
REPLY = struct.Struct("<BIi")  # READY or FAULT, completion, memory in KiB; a fault's text follows
MESSAGE_BYTES = 65_536
COMPILED = 0  # the completion's number in the reply that the grammar is compiled


@dataclass(frozen=True, slots=True)
class Limits:
    """What one grammar may cost.

    Args:
        compile_cpu_s: processor time to compile it and to make its first mask.
        step_cpu_s: processor time of one further mask.
        walk_cpu_s: processor time of one completion's masks together, over `token_cpu_s` each.
        token_cpu_s: see there.
        compile_bytes: memory over what the worker starts with.
        walk_bytes: memory over what the compiled grammar takes.
    """

    compile_cpu_s: float = 2.0
    step_cpu_s: float = 0.5
    walk_cpu_s: float = 2.0
    token_cpu_s: float = 0.02
    compile_bytes: int = 384 << 20
    walk_bytes: int = 64 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server starts with; the tokenizer's JSON comes in a descriptor of its own.

    Args:
        vocab_size: bits of a mask.
        eos_token_ids: any of them may end a completion that is complete.
        slots: completions of one grammar at a time.
        limits: of each worker.
    """

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    slots: int
    limits: Limits

    @property
    def mask_bytes(self) -> int:
        """Return the size of one mask: whole 32-bit words."""
        return (self.vocab_size + 31) // 32 * 4

    def dump(self) -> bytes:
        """Return the settings as a message."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def parse(cls, message: bytes) -> Settings:
        """Return the settings of a message."""
        fields = json.loads(message)
        return cls(
            fields["vocab_size"],
            tuple(fields["eos_token_ids"]),
            fields["slots"],
            Limits(**fields["limits"]),
        )


@dataclass(frozen=True, slots=True)
class Job:
    """One grammar to compile: `protocol.Structure`, as plain data."""

    kind: Literal["json_object", "json_schema", "regex", "choice", "grammar"]
    definition: str
    strict: bool
