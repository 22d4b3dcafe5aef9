"""What a replica does beside its engine."""

import asyncio

from serve_app.deployments import server
from serve_app.deployments.server import end_when_dead
from serve_app.errors import EngineDead


class Engine:
    """Stops when `dead` is set."""

    def __init__(self):
        self.dead = False

    def check(self):
        """Raise once it has stopped."""
        if self.dead:
            raise EngineDead("the engine stopped")


async def test_end_when_dead(monkeypatch):
    """Not before, and after a while for what the streams have to say; once."""
    monkeypatch.setattr(server, "LAST_WORDS_S", 0.05)
    engine, ends = Engine(), []
    watching = asyncio.create_task(end_when_dead(engine, ends.append, look_s=0.01))
    await asyncio.sleep(0.1)
    assert (ends, watching.done()) == ([], False)
    engine.dead = True
    await asyncio.wait_for(watching, 5)
    assert ends == [1]
