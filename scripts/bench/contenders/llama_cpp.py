"""llama.cpp through its Python bindings: prompts and decoding tokens packed as it wants them."""

from __future__ import annotations

import ctypes
import tempfile
import time
from dataclasses import dataclass, field

import llama_cpp as lib
import numpy as np

from scripts.bench.worker import Run, Setup
from scripts.bench.workload import Request, Stream

BATCH_TOKENS = 512


@dataclass
class _Sequence:
    tokens: list[int]
    max_tokens: int
    done: int = 0
    stream: Stream = field(default_factory=lambda: Stream([], []))


def settings(setup: Setup, _start: str) -> str:
    """Say what is set; all else is its default."""
    return (
        f"llama-cpp-python {lib.__version__}, one cache for all sequences, batches of "
        f"{BATCH_TOKENS} tokens, {setup.threads} threads"
    )


def load(setup: Setup) -> Run:
    """Load the GGUF file with one cache for all sequences."""
    lib.llama_backend_init()
    with tempfile.TemporaryDirectory() as directory:
        path = _converted(setup, f"{directory}/model.gguf")
        model = lib.llama_model_load_from_file(path, lib.llama_model_default_params())
    params = lib.llama_context_default_params()
    params.n_ctx = setup.streams * setup.window
    params.n_batch = params.n_ubatch = BATCH_TOKENS
    params.n_seq_max = setup.streams
    params.n_threads = params.n_threads_batch = setup.threads
    params.kv_unified = True
    context = lib.llama_init_from_model(model, params)
    vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(BATCH_TOKENS, 0, 1)

    def step(sequences: dict[int, _Sequence], began: float) -> None:
        _pack(batch, sequences)
        if lib.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        for at in range(batch.n_tokens):
            if not batch.logits[at]:
                continue
            number = batch.seq_id[at][0]
            sequence = sequences[number]
            logits = np.ctypeslib.as_array(
                lib.llama_get_logits_ith(context, at), shape=(vocabulary,)
            )
            token = int(logits.argmax())
            sequence.tokens.append(token)
            sequence.stream.ids.append(token)
            sequence.stream.times.append(time.perf_counter() - began)
            if len(sequence.stream.ids) == sequence.max_tokens:
                lib.llama_memory_seq_rm(lib.llama_get_memory(context), number, -1, -1)
                del sequences[number]

    def run(requests: list[Request]) -> list[Stream]:
        began = time.perf_counter()
        every = [_Sequence(list(request.prompt), request.max_tokens) for request in requests]
        sequences = dict(enumerate(every))
        while sequences:
            step(sequences, began)
        return [sequence.stream for sequence in every]

    return run


def _converted(setup: Setup, target: str) -> bytes:
    """Write the model in the run's dtype; what is quantised becomes what it stands for."""
    params = lib.llama_model_quantize_default_params()
    bfloat16 = setup.dtype == "bfloat16"
    params.ftype = lib.LLAMA_FTYPE_MOSTLY_BF16 if bfloat16 else lib.LLAMA_FTYPE_ALL_F32
    params.allow_requantize = True
    if lib.llama_model_quantize(setup.gguf.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError("the GGUF file cannot be converted")
    return target.encode()


def _pack(batch: lib.llama_batch, sequences: dict[int, _Sequence]) -> None:
    """Fill a batch: decoding tokens first, then what fits of the prompts."""
    at = 0
    for number, sequence in sorted(sequences.items(), key=lambda item: not item[1].stream.ids):
        missing = sequence.tokens[sequence.done : sequence.done + BATCH_TOKENS - at]
        for token in missing:
            batch.token[at] = token
            batch.pos[at] = sequence.done
            batch.n_seq_id[at] = 1
            batch.seq_id[at][0] = number
            sequence.done += 1
            batch.logits[at] = sequence.done == len(sequence.tokens)
            at += 1
    batch.n_tokens = at
