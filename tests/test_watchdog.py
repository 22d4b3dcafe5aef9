"""Work that does not end is noticed; a process that was merely stopped is not blamed."""

import asyncio
import threading
import time

from serve_app.watchdog import LoopWatchdog, Watchdog, stack_of


def watched(working, *, limit_s=0.2):
    """Return a started watchdog and the list that its alarms go to."""
    alarms: list[float] = []
    watchdog = Watchdog("w", working=working, limit_s=limit_s, alarm=alarms.append)
    watchdog.start()
    return watchdog, alarms


def test_watchdog_finds_one_piece_of_work_that_goes_on():
    """One alarm, after the limit and not much later."""
    watchdog, alarms = watched(lambda: 7)
    started = time.monotonic()
    while not alarms and time.monotonic() - started < 10:
        time.sleep(0.01)
    assert alarms
    assert alarms[0] >= 0.19
    time.sleep(0.5)
    assert len(alarms) == 1
    watchdog.stop()


def test_watchdog_finds_no_hang_in_many_pieces_of_work_or_none():
    """Neither a busy thread nor an idle one hangs."""
    count = iter(range(10**9))
    busy, alarms = watched(lambda: next(count))
    idle, others = watched(lambda: None)
    time.sleep(0.6)
    assert alarms == others == []
    busy.stop()
    idle.stop()


async def test_loop_watchdog_finds_an_event_loop_that_is_blocked():
    """It is noticed from outside, with the line that blocks it."""
    stacks: list[str] = []
    here = threading.get_ident()
    watchdog = LoopWatchdog(
        asyncio.get_running_loop(), limit_s=0.2, alarm=lambda _: stacks.append(stack_of(here))
    )
    watchdog.start()
    await asyncio.sleep(0.5)
    assert not stacks
    time.sleep(1.0)  # noqa: ASYNC251 - this is the fault
    assert len(stacks) == 1
    assert "time.sleep(1.0)" in stacks[0]
    watchdog.stop()


def test_loop_watchdog_ignores_a_closed_loop():
    """Nobody waits for a sign of life of what is over."""
    loop = asyncio.new_event_loop()
    alarms: list[float] = []
    watchdog = LoopWatchdog(loop, limit_s=0.1, alarm=alarms.append)
    loop.close()
    watchdog.start()
    time.sleep(0.4)
    assert alarms == []


def test_stack_of_nobody():
    """A thread that has ended has no stack."""
    assert stack_of(None) == stack_of(1) == ""
