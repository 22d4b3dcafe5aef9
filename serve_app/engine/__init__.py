"""One replica's engine: prompts in, tokens out, one forward a step. Imports nothing.

    Engine.generate            engine.py       check, encode, submit; deltas back to the reader
      PromptEncoder            prompt.py       text to ids; every fault of a client ends here
        ChatRenderer           conversation.py   the chat template (chat_template.py: within limits;
                                                 history.py: what it refuses in another form)
        SpecialTokens          special_tokens.py which are added, hidden, ends
      Admission                admission.py    how much may wait, in requests and in tokens
      Sequence ──► queue ──►   loop.py         THE STEP, on the engine's own thread:
        Scheduler.plan         scheduler.py      which rows, within the step's token budget
          PrefixCache          prefix_cache.py   what is computed already, and where it lies
          RegionAllocator      regions.py        contiguous places in the KV cache
        Runner.step            runner.py         moves, forward, sampling
          Forward.logits                         one of
            NativeForward      native/             compiled for the CPU, bitwise batch-invariant
            FixedForward       fixed.py            makes the others so: batches of one size
            GraphedForward     graphs.py           CUDA graphs of decode steps
            TransformersForward forward.py         any architecture, over attention/
          adjusted             adjust.py         bias, penalties, bans; structure.py: grammars
          sample, score        sampling.py       a token a row by its own seed; logprobs
      Stream ◄── updates       stream.py       one reader's turn
      Completion ──► TokenDelta completion.py  detokenizer.py, reasoning.py, stop.py

`Engine.load`: loading.py (files to a model), assembly.py (which forward, how large a cache),
warm_up.py (it must give numbers and text).

The asyncio side knows text, the thread knows token ids only; a queue leads each way.
"""
