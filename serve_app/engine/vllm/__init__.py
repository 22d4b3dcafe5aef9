"""vLLM below the front end of all engines; imported only with `engine.backend: vllm`.

    VllmEngine      engine.py       START HERE: load, and what the front end leaves to an engine
      VllmLoop      loop.py         AsyncLLM on a thread and an event loop of its own
        requests.py                 a sequence to vLLM's SamplingParams
        adapters.py                 LoRA adapters: vLLM's arguments and requests for them
        structures.py               a structure to a constraint of vLLM's, in our spelling of JSON
        outputs.py                  vLLM's outputs to updates
        Counts      counts.py       its numbers, for our metrics and limits
        Guard       guard.py        ends vLLM's processes when the replica's own is gone
      arguments.py                  the config to vLLM's engine arguments
      environment.py                what vLLM's processes find in their environment

The model computes in processes of vLLM's own, offline and without a token. Prompts, texts, stop
strings, admission and errors are the front end's; vLLM gets ids and gives ids.
"""

# Before any module of this package imports vLLM, which reads its environment only then.
from serve_app.engine.vllm import environment

__all__ = ["environment"]
