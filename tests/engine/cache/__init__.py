"""Tests of serve_app/engine/cache."""
