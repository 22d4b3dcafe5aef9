"""Tests of `scripts/local_hub`."""
