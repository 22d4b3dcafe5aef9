"""The KV cache as the scheduler sees it: tokens in places. No tensors.

places.py        the places of sequences: found, copied, grown, given back
prefix_cache.py  which computed blocks lie where: prompts that begin alike share work
allocator.py     contiguous places in a flat pool
"""
