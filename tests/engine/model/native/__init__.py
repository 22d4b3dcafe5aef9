"""The CPU's own forward."""
