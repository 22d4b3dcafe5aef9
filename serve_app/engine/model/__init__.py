"""Tensors: a directory of weights to one step a call.

runner.py               START HERE: one step: rows through the forward, then a token each
loading.py              a directory of weights to a model on its device
build.py                which forward, and a cache of the size that memory pays for
openmp.py               ends the workers of a thread that computes no more
probe.py                one forward that looks: attention layers, memory of a step
llama_like.py           which models are a Llama in all but their sizes
fused_llama.py          those in fewer and larger operations, for CUDA
fused_norms.py          RMSNorm by torch's one kernel, where a model's own is the same
kv_cache.py             the pools of K and V
native/                 the forward compiled for the CPU, bitwise batch-invariant
transformers_forward.py transformers' own model, whatever its architecture, over attention/
batch_invariant.py      makes that batch-invariant: every token a row of a batch of one size
cuda_graphs.py          CUDA graphs of decode steps
logits_processors.py    bias, penalties, bans, structure: before a token is drawn
sampling.py             logits to token ids, each row by its own seed
"""
