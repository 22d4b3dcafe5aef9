"""The model: loading, KV cache, attention, scheduling and sampling on one thread.

    engine.py     START HERE: the asyncio side, `generate(request)`
      prompt.py       validate and encode     detokenizer.py, stop.py   ids back to text
    loop.py       the engine thread: commands in, one step, updates out
      scheduler.py    who computes what next  regions.py   places in the KV cache
      runner.py       one packed forward      sampling.py  logits to ids
      kv_cache.py     the pools of K and V    attention/   one backend a file
    loading.py    a directory to a model on its device

The asyncio side knows text, the thread knows token ids only; a queue leads each way.
"""
