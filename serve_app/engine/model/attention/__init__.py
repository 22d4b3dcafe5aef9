"""Attention over the KV cache: one backend a file, all proven equal by the same tests."""
