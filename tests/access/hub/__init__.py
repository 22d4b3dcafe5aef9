"""Tests of serve_app/access/hub."""
