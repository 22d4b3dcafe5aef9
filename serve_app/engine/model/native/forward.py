"""Steps through forward.cpp: its weights, its cache and its workspace in torch's memory."""

from __future__ import annotations

import ctypes

import torch

from serve_app.engine.model.kv_cache import zeros
from serve_app.engine.model.native.library import LAYER_WEIGHTS, SPARE_ROWS, Layer, Model, Step
from serve_app.engine.model.native.weights import COLUMNS, Weights
from serve_app.engine.sequence import Move, Row


class NativeForward:
    """See `Forward`. Results are bitwise the same whatever else is in a step.

    Regions of the cache must start at multiples of 32 tokens: it is kept in blocks of them.

    Args:
        library: the compiled forward.cpp.
        weights: of the model.
        kv_tokens: size of the cache, a multiple of 32.
        max_batch_tokens: tokens of one step at the most.
    """

    name = "native"

    def __init__(
        self, library: ctypes.CDLL, weights: Weights, *, kv_tokens: int, max_batch_tokens: int
    ) -> None:
        dtype = weights.head.dtype
        self._run = getattr(library, f"forward_{str(dtype).removeprefix('torch.')}")
        self._weights = weights
        # Zeros and not garbage: no NaN.
        self._cache = zeros(
            len(weights.layers),
            weights.kv_heads,
            kv_tokens // COLUMNS,
            _block_size(weights),
            dtype=dtype,
            device=weights.head.device,
        )
        self._layers = (Layer * len(weights.layers))(
            *(self._layer(index) for index in range(len(weights.layers)))
        )
        self._model = self._describe()
        self._step = self._workspace(max_batch_tokens)

    def move(self, moves: tuple[Move, ...]) -> None:
        """See `Forward.move`."""
        for move in moves:
            source, target = move.source // COLUMNS, move.target // COLUMNS
            # The last block whole: what is garbage in it is written over before it is read.
            blocks = -(-move.length // COLUMNS)
            copied = self._cache[:, :, source : source + blocks]
            self._cache[:, :, target : target + blocks] = copied

    def logits(self, rows: list[Row]) -> torch.Tensor:
        """See `Forward.logits`; float32."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        spans: list[int] = []
        keep: list[int] = []
        for row in rows:
            end = row.start + row.count
            spans += (len(ids), row.count, row.place, end)
            ids += row.ids
            positions += range(row.start, end)
            slots += range(row.place + row.start, row.place + end)
            keep += range(len(ids) - row.kept, len(ids))
        logits = torch.empty(len(keep), self._weights.vocabulary, dtype=torch.float32)
        lists = {"ids": ids, "positions": positions, "slots": slots, "span": spans, "keep": keep}
        inputs = {name: torch.tensor(part, dtype=torch.int32) for name, part in lists.items()}
        step = self._step
        for name, tensor in inputs.items():
            setattr(step, name, tensor.data_ptr())
        step.tokens, step.spans, step.kept = len(ids), len(rows), len(keep)
        step.logits = logits.data_ptr()
        # Each time: whoever computes says how many, also a warm-up on another thread.
        self._model.threads = torch.get_num_threads()
        self._run(self._model, step)
        return logits

    def _layer(self, index: int) -> Layer:
        layer = self._weights.layers[index]
        tensors = {name: getattr(layer, name) for name in LAYER_WEIGHTS}
        return Layer(
            **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
            cache=self._cache[index].data_ptr(),
            window=layer.window,
        )

    def _describe(self) -> Model:
        weights = self._weights
        return Model(
            layers=len(weights.layers),
            hidden=weights.hidden,
            intermediate=weights.intermediate,
            heads=weights.heads,
            kv_heads=weights.kv_heads,
            head_dim=weights.head_dim,
            rotary=2 * weights.cos.shape[1],
            vocabulary=weights.vocabulary,
            blocks=self._cache.shape[2],
            eps=weights.eps,
            scale=weights.scale,
            layer=self._layers,
            embedding=None if weights.embedding is None else weights.embedding.data_ptr(),
            head=weights.head.data_ptr(),
            norm=weights.norm.data_ptr(),
            cos=weights.cos.data_ptr(),
            sin=weights.sin.data_ptr(),
        )

    def _workspace(self, tokens: int) -> Step:
        weights = self._weights
        queries = weights.heads * weights.head_dim
        columns = queries + 2 * weights.kv_heads * weights.head_dim
        wide = {"x": weights.hidden, "qkv": columns + -columns % COLUMNS}
        narrow = {
            "normed": weights.hidden,
            "query": queries,
            "attended": queries,
            "inner": weights.intermediate,
        }
        # Held here: the step has only their addresses.
        self._tensors = {
            **{name: torch.empty(tokens, size) for name, size in wide.items()},
            **{
                name: torch.empty(tokens + SPARE_ROWS, size, dtype=weights.head.dtype)
                for name, size in narrow.items()
            },
        }
        return Step(**{name: tensor.data_ptr() for name, tensor in self._tensors.items()})


def _block_size(weights: Weights) -> int:
    """Return the numbers of one head's keys and values of a block; values fill whole panels."""
    return COLUMNS * (weights.head_dim + weights.head_dim + -weights.head_dim % COLUMNS)
