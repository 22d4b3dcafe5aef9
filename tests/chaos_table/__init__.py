"""The script that breaks things."""
