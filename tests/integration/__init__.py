"""Tests that start Ray; each starts an instance of its own and stops only that."""
