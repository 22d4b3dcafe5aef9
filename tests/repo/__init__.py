"""Checks of the repository itself: README, architecture, scripts."""
