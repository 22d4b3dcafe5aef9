"""What runs inside Serve's own actors: light to import, so that they do not notice."""

import os


def pid(_actor: object) -> int:
    """Return the actor's process."""
    return os.getpid()
