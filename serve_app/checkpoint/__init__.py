"""What a checkpoint is: which files of a repository, under which names, and who can load them.

files.py          START HERE: the one rule of which files are the model, transformers' rule
names.py          names that a listing may have; everything else is refused
headers.py        the header of a safetensors file, read with limits before any library does
runnable.py       from config.json and the file names: can this engine load it?
architectures.py  the table of architectures for it
directory.py      all of it for a directory on this machine
adapter.py        the same for a LoRA adapter

Pure: no network, no torch, nothing of the package but its errors. The gate, the plan, the
download and the loader ask here, so that they never disagree.
"""
