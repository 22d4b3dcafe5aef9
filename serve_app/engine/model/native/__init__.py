"""The CPU's own forward: a Llama-like model in one call of compiled code."""
