"""Tests of serve_app/engine/model."""
