"""Configs name the trace exporter by this path."""

from serve_app.telemetry.tracing import otlp

__all__ = ["otlp"]
