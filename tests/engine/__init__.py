"""Tests of the engine: tiny random models, the demo model, and pure Python parts."""
