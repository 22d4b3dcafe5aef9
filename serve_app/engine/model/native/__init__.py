"""The forward compiled for the CPU, bitwise batch-invariant: Llama, Mistral, Qwen 2 and Qwen 3.

forward.py    a step through the compiled code
weights.py    a model's weights in the layout that it reads
huge_pages.py the memory that they lie in
library.py    compiles forward.cpp for this CPU, once
"""
