"""Load tests of any OpenAI-compatible service: what it holds, and how the client knows."""
