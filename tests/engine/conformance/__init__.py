"""What every `LLMEngine` has to do: the builtin one, vLLM, and the double of the other tests."""
