"""Structures: what they mean, what they may cost."""
