"""The HTTP application, over a scripted engine."""
