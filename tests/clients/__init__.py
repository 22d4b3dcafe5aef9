"""Clients that people use, unmodified, each in an environment of its own."""
