"""The model: loading, KV cache, attention, scheduling and sampling on one thread."""
