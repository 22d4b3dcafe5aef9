"""The process that forks workers: it holds llguidance's view of the tokenizer, nothing else.

That view takes a second to make and a fork shares it. The server itself never touches a client's
text, so nothing that a client sends can end it. It imports no more than the standard library and
llguidance: a fork has to be small and quick.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import socket
import sys
from typing import Any

from llguidance import LLTokenizer

from serve_app.engine.grammar.wire import MESSAGE_BYTES, Job, Settings
from serve_app.engine.grammar.worker import work


def read_all(descriptor: int) -> bytes:
    """Return what a descriptor's file holds, from its beginning, and close it."""
    with os.fdopen(descriptor, "rb") as file:
        file.seek(0)
        return file.read()


def main(descriptor: int) -> None:
    """Run the server until the engine is gone.

    Args:
        descriptor: of the control socket.
    """
    control = socket.socket(fileno=descriptor)
    _be_expendable()
    message, (tokenizer, *_), *_ = socket.recv_fds(control, MESSAGE_BYTES, 1)
    settings = Settings.parse(message)
    try:
        tokens = _tokens(read_all(tokenizer).decode(), settings)
    except (ValueError, TypeError, OSError) as error:
        control.send(json.dumps({"fault": str(error).partition("\n")[0][:300]}).encode())
        return
    gc.freeze()  # a collection in a fork would write to every page that it shares
    control.send(b"{}")
    statuses: dict[int, int] = {}
    while True:
        message, descriptors, *_ = socket.recv_fds(control, MESSAGE_BYTES, 3)
        if not message:
            return
        _reap(statuses)
        command = json.loads(message)
        if command["do"] == "spawn":
            answer: dict[str, int | None] = {"pid": _spawn(control, descriptors, tokens, settings)}
        else:
            answer = {"status": _govern(command["do"], command["pid"], statuses)}
        control.send(json.dumps(answer).encode())


def _be_expendable() -> None:
    """Leave no core, which would hold a client's text, and be the first to go without memory."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        with open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:  # noqa: PTH123
            file.write("1000")
    except OSError:  # no such file, or none that may be written: only the order is lost
        pass


def _tokens(tokenizer: str, settings: Settings) -> Any:
    return LLTokenizer(
        tokenizer, n_vocab=settings.vocab_size, eos_token=list(settings.eos_token_ids)
    )


def _reap(statuses: dict[int, int]) -> None:
    """Collect the workers that have ended, so that none stays as a zombie."""
    try:
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            statuses[ended[0]] = ended[1]
    except ChildProcessError:  # there is none
        pass
    for pid in list(statuses)[:-256]:  # of those that nobody asked for
        del statuses[pid]


def _govern(what: str, pid: int, statuses: dict[int, int]) -> int | None:
    """Do something with a worker; only its parent can be sure that the number is still its own.

    Returns:
        For `status` the wait status of a worker that is ending; None where nobody knows.
    """
    if pid not in statuses:
        try:
            if what == "nice":
                os.setpriority(os.PRIO_PROCESS, pid, 19)
            elif what == "kill":
                os.kill(pid, signal.SIGKILL)
            elif what == "status":
                statuses[pid] = os.waitpid(pid, 0)[1]
        except OSError:  # there is no such worker
            return None
    return statuses.pop(pid, None) if what == "status" else None


def _spawn(control: socket.socket, descriptors: list[int], tokens: Any, settings: Settings) -> int:
    pid = os.fork()
    if not pid:
        try:
            control.close()
            connection, slots, job = descriptors
            work(socket.socket(fileno=connection), slots, Job(**json.loads(read_all(job))), tokens,
                 settings)  # fmt: skip
        finally:
            os._exit(1)
    for descriptor in descriptors:
        os.close(descriptor)
    return pid


if __name__ == "__main__":
    main(int(sys.argv[1]))
