"""Tests mirror the package; `cluster/` starts Ray, `gpu/` needs a GPU, `repo/` checks the rest."""
