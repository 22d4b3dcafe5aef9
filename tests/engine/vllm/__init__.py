"""What is vLLM's own; skipped without it."""
