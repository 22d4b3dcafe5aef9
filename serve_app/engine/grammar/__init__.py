"""Structured output, enforced token by token, at no risk to the engine.

What a client's schema, expression or grammar costs is paid in processes of its own: they compile
it, walk it, and die at their limits. The engine only reads the masks that they leave in shared
memory, and a request whose mask is late sits out a step.

limits.py    what is refused before anything is compiled
schema.py    a JSON schema as its author means it: closed objects, local references
compile.py   a structure to llguidance's form; runs in a worker
worker.py    THE PROCESSES: a server that holds the tokenizer and forks a worker per grammar
pool.py      the engine's side: compile once, reuse, replace, bound
matcher.py   one completion's way through a grammar, as the engine's thread sees it
late.py      the same for models that think: it begins behind the thoughts
"""
