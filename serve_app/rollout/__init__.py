"""Rollouts from the command line: gate, apply, watch, ask, and back if it fails."""
