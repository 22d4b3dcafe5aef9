"""Configs name the autoscaling policy by this path."""

from serve_app.deployments.autoscaling import TokenLoad

__all__ = ["TokenLoad"]
