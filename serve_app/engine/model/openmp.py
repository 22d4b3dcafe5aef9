"""The workers that torch and the compiled forward compute with on CPUs."""

from __future__ import annotations

import ctypes

OMP_PAUSE_SOFT = 1  # omp.h


def end_workers() -> None:
    """End those of the calling thread; should it compute again, it starts new ones.

    GCC's OpenMP keeps a team for each thread that ever computed. Once all teams together have more
    threads than there are cores, workers no longer spin at a barrier but sleep (libgomp's manual,
    GOMP_SPINCOUNT), though all teams but one are idle: on two cores a decode step of a small model
    took a sixth longer. Other OpenMP runtimes have one team for all, and are left alone.
    """
    symbols = ctypes.CDLL(None)  # torch loads its runtime for everybody
    if hasattr(symbols, "GOMP_parallel") and not hasattr(symbols, "__kmpc_fork_call"):
        symbols.omp_pause_resource_all(OMP_PAUSE_SOFT)
