"""Attention of a packed step over the flat KV cache, as transformers calls it.

interface.py  what is registered with transformers, and which of the next a device takes
step.py       where each row's keys lie in this step
varlen.py     FlashAttention from torch, on CUDA
sdpa.py       torch's scaled dot product attention, anywhere
"""
