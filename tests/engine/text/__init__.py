"""Tests of serve_app/engine/text."""
