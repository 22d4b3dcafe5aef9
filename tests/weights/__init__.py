"""Tests of the weights' way to a node."""
