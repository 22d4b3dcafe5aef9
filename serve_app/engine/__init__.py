"""One replica's engine: prompts in, tokens out, one forward a step. This file imports nothing.

    FrontEnd.generate           front_end.py   check, encode, submit; deltas back to the reader
      PromptEncoder             text/          text to ids; every fault of a client ends here
      GrammarPool               grammar/       structures, compiled in processes of their own
      Admission                 admission.py   how much may wait, in requests and in tokens
      Sequence ──► queue ──►    loop.py        THE STEP, on the engine's own thread:
        Scheduler.plan          scheduler.py     which rows, within the step's token budget
          WaitingLine           waiting.py       whose turn it is
          Places                cache/           what is computed already, and where it lies
          Drafter               speculative.py   guesses that a step may check
        Runner.step             model/           moves, forward, sampling
      Stream ◄── updates        stream.py      one reader's queue
      Completion ──► TokenDelta text/          ids to text, stops, reasoning

backends.py: which engine a replica runs. engine.py: the one above. vllm/: vLLM below the same front
end, in place of loop.py and what it calls.

`Engine.load`: model/loading.py (files to a model), model/build.py (which forward, how large a
cache), warm_up.py (it must give numbers and text), defaults.py (sampling defaults of its authors).

sampling_rules.py: ranges of sampling parameters. sequence.py: a request as the thread sees it.
drain.py: how fast work is done, for Retry-After. stats.py: plain numbers, safe without torch.

The asyncio side knows text, the thread knows token ids only; a queue leads each way.
"""
