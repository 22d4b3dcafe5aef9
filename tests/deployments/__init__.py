"""Tests of serve_app/deployments."""
