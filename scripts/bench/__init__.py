"""This engine and its peers on one workload, in turns, in one call: `scripts/bench_engine`."""
