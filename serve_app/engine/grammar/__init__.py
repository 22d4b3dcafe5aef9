"""Structured output, enforced token by token, at no risk to the engine.

What a client's schema, expression or grammar costs is paid in processes of its own: they compile
it, walk it, and die at their limits. The engine only reads the masks that they leave in shared
memory, and a request whose mask is late sits out a step.

pool.py       START HERE: compile once, reuse, replace, bound (fair_executor.py: clients take turns)
processes.py  the server and its workers, as the engine's side holds them
matcher.py    one completion's way through a grammar, as the engine's thread sees it
late.py       the same for models that think: it begins behind the thoughts
wire.py       what the processes say to each other
server.py     the process that holds the tokenizer and forks a worker per grammar
worker.py     compiles one grammar and walks it, under the kernel's limits
compile.py    a structure to llguidance's form
schema.py     a JSON schema as its author means it: closed objects, local references
references.py where the parts of a schema are, and what references call them
limits.py     what is refused before anything is compiled
"""
