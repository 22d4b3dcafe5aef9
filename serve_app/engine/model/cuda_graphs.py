"""Decode steps as CUDA graphs: one launch a step instead of some for every layer.

A graph computes a fixed number of rows out of buffers that never move; a step writes its rows
there and replays the smallest graph that holds them. Rows left over are padding: they decode
a token nobody asked for, in places of the cache that the scheduler does not know. Prompts and
everything that is not one token a row run as before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from serve_app.engine.model.attention.varlen import VarlenBackend
from serve_app.engine.model.transformers_forward import Packed, TransformersForward
from serve_app.engine.sequence import Move, Row

# Rows of the graphs: close together, because padding costs; small ones for few streams.
SMALL, STEP = (1, 2, 4), 8

Compute = Callable[[], None]
Record = Callable[[Compute], Compute]


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """What a recorded step depends on.

    Args:
        backend: attends.
        sizes: rows of each graph, ascending; no step of more rows is replayed.
        window: tokens of a row at the most.
        scratch: the first place of the cache for padding, behind all others; as many as rows.
        device: of the whole model.
    """

    backend: VarlenBackend
    sizes: tuple[int, ...]
    window: int
    scratch: int
    device: torch.device


class GraphedForward:
    """See `Forward`.

    Args:
        eager: computes what no graph does, and what is recorded.
        decode: the steps to record.
        record: turns a computation into its replay.

    Raises:
        RuntimeError: the model does what cannot be recorded.
    """

    @torch.inference_mode()
    def __init__(self, eager: TransformersForward, decode: DecodeRows, record: Record) -> None:
        self._eager = eager
        self._decode = decode
        most, device = decode.sizes[-1], decode.device
        self._most = most
        self._every = torch.arange(most + 1, device=device)
        # Ids, positions, slots, starts and lengths of each row, on the device and on the host. The
        # starts have one more, which closes the last region of a graph of all rows.
        self._inputs = torch.zeros(5, most + 1, dtype=torch.int64, device=device)
        self._host = torch.zeros(5, most + 1, dtype=torch.int64)
        self._table = self._host.numpy()
        self._padding = np.zeros_like(self._table)
        self._padding[2:4] = decode.scratch + np.arange(most + 1)
        self._padding[4] = 1
        self._write([])
        # The graphs share memory, so what they return is copied out of it, to one place for all.
        self._logits = torch.empty_like(self._compute(most))
        # The largest first: the others find room in its memory.
        self._replays = {
            rows: record(partial(self._recorded, rows)) for rows in reversed(decode.sizes)
        }

    def move(self, moves: tuple[Move, ...]) -> None:
        """See `Forward.move`."""
        self._eager.move(moves)

    def logits(self, rows: list[Row]) -> torch.Tensor:
        """See `Forward.logits`; from a graph, they are valid until the next step."""
        if len(rows) > self._most or any(row.count != 1 or row.kept != 1 for row in rows):
            return self._eager.logits(rows)
        self._write(rows)
        self._replays[min(size for size in self._replays if size >= len(rows))]()
        return self._logits[: len(rows)]

    def _write(self, rows: list[Row]) -> None:
        """Write rows and padding after them to the buffers, in one copy."""
        count = len(rows)
        self._table[:, count:] = self._padding[:, count:]
        if rows:
            self._table[:, :count] = (
                [row.ids[0] for row in rows],
                [row.start for row in rows],
                [row.place + row.start for row in rows],
                [row.place for row in rows],
                [row.start + 1 for row in rows],
            )
        self._inputs.copy_(self._host)

    def _compute(self, rows: int) -> torch.Tensor:
        """Compute the first rows of the buffers; no value of theirs reaches the host."""
        ids, positions, slots, starts, used = self._inputs
        indices = {
            "cu_seq_q": self._every[: rows + 1].int(),
            "cu_seq_k": starts[: rows + 1].int(),
            "seqused_k": used[:rows].int(),
        }
        packed = Packed(ids[:rows], positions[:rows], slots[:rows], self._every[:rows])
        attention = self._decode.backend.decode(indices, max_k=self._decode.window)
        return self._eager.compute(packed, attention)

    def _recorded(self, rows: int) -> None:
        self._logits[:rows].copy_(self._compute(rows))


def sizes(max_rows: int) -> tuple[int, ...]:
    """Return the rows of each graph, ascending; the last is `max_rows`."""
    return (*(n for n in (*SMALL, *range(STEP, max_rows, STEP)) if n < max_rows), max_rows)


class CudaRecorder:
    """Records computations as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Record a computation.

        Raises:
            RuntimeError: it does what a graph cannot, as waiting for the device.
        """
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self._device)
        # Libraries choose and load their kernels on a first call, which may not be recorded.
        compute()
        try:
            # Other threads of a replica may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                compute()
        finally:  # torch 2.13 stays on its own stream when a recording fails
            torch.cuda.set_stream(before)
        replay: Compute = graph.replay
        return replay
