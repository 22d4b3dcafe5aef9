"""Tests of `serve_app.loadtest`."""
