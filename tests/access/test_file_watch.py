"""Files that change under a running service: seen, announced once, checked on their node alone."""

import asyncio
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from ray.exceptions import RayError
from structlog.testing import capture_logs

from serve_app.access import file_watch
from serve_app.access.file_watch import Announced, Change, FileWatch, announce, token_files
from serve_app.access.recheck import AtOnce, Watch
from serve_app.access.verdict import Outcome
from serve_app.config import AccessConfig
from tests.access.cases import COMMIT, granted, verdict
from tests.access.test_recheck import verdict as decision

CHANGE = Change("token", "/t", "1-2-3", "alice")


class Seen:
    """The changes that a watch reports, as they come."""

    def __init__(self):
        self.changes = []
        self._more = threading.Semaphore(0)

    def __call__(self, change):
        self.changes.append(change)
        self._more.release()

    def next(self):
        assert self._more.acquire(timeout=10)
        return self.changes[-1]


@pytest.fixture
def seen():
    return Seen()


@pytest.fixture
def watched(tmp_path, seen):
    """A file that is looked at a hundred times a second."""
    file = tmp_path / "token"
    file.write_text("one")
    watch = FileWatch({"token": file}, seen, look_s=0.01)
    watch.start()
    threading.Event().wait(0.05)  # its first look
    yield file
    watch.stop()


def test_file_watch_sees_a_file_written_replaced_or_gone(watched, tmp_path, seen):
    """By its date, its size or its inode; its owner is named, its content is not read."""
    watched.write_text("two, longer")
    assert (seen.next().kind, seen.changes[0].path) == ("token", str(watched))
    times = watched.stat()
    other = tmp_path / "other"
    other.write_text("tow, longer")
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    other.replace(watched)
    assert seen.next().stamp.endswith(f"-{watched.stat().st_ino}")
    watched.unlink()
    assert (seen.next().stamp, seen.changes[-1].owner) == ("gone", "nobody")
    watched.write_text("again")
    assert seen.next().owner == Path("/proc/self").owner()
    assert len({change.stamp for change in seen.changes}) == 4


def test_file_watch_sees_a_mounted_secret_change_by_a_links_swap(tmp_path, seen):
    """As the kubelet does it: the files are new, the path is the old one."""
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "hf").write_text("token")
    (tmp_path / "data").symlink_to("1")
    watch = FileWatch({"identity": tmp_path / "data" / "hf"}, seen, look_s=0.01)
    watch.start()
    threading.Event().wait(0.05)
    (tmp_path / "new").symlink_to("2")
    (tmp_path / "new").replace(tmp_path / "data")
    assert seen.next().kind == "identity"
    watch.stop()


def test_file_watch_goes_on_after_a_fault_of_who_is_called(tmp_path, seen, monkeypatch):
    """The same change is reported again; the log has the place, and not what was said."""
    monkeypatch.setattr(file_watch, "PAUSE_S", 0.01)
    faults = [ValueError("a secret"), RayError("a secret")]
    file = tmp_path / "token"
    file.write_text("one")

    def on_change(change):
        if faults:
            raise faults.pop()
        seen(change)

    watch = FileWatch({"token": file}, on_change, look_s=0.01)
    with capture_logs() as logs:
        watch.start()
        threading.Event().wait(0.05)
        file.write_text("two, longer")
        assert seen.next().kind == "token"
        file.unlink()
        assert seen.next().stamp == "gone"
    watch.stop()
    assert len(seen.changes) == 2
    assert [(line["event"], line["cause"]) for line in logs] == [
        ("job.failed", "RayError"),
        ("job.failed", "ValueError"),
    ]
    assert "secret" not in str(logs)


def test_file_watch_owner_without_a_name_is_a_number(tmp_path, monkeypatch):
    """In a container."""
    monkeypatch.setattr(file_watch.pwd, "getpwuid", lambda _: {}["none"])
    (tmp_path / "f").touch()
    assert file_watch._owner(tmp_path / "f") == f"uid {os.getuid()}"


@pytest.mark.parametrize(
    ("access", "kind", "path"),
    [
        ({"token_file": "/run/token"}, "token", "/run/token"),
        ({"identity": {"token_file": "/run/id", "resource": "user/a"}}, "identity", "/run/id"),
        ({}, "token", None),
    ],
)
def test_token_files_are_those_that_a_token_comes_from(access, kind, path):
    """The configured one, else the stored login."""
    expected = Path(path or constants.HF_TOKEN_PATH)
    assert token_files(AccessConfig(**access)) == {kind: expected}


def test_announce_keeps_one_change_for_a_node(kv_store):
    """Whichever of its processes saw it first; only the newest of a kind is kept."""
    announced = Announced("llm")
    assert announced.nodes() == frozenset()
    assert announce("llm", "n1", CHANGE) is True
    assert announce("llm", "n1", CHANGE) is False
    assert announce("llm", "n2", replace(CHANGE, kind="identity")) is True
    assert announce("other", "n3", CHANGE) is True
    assert announced.nodes() == {"n1", "n2"}
    assert announced.nodes() == frozenset()
    assert announce("llm", "n1", replace(CHANGE, stamp="2")) is True
    assert announced.nodes() == {"n1"}
    assert Announced("llm").nodes() == frozenset()  # what was before it is known


def test_announce_of_clients_keys_ends_no_grant(kv_store):
    """Their change is announced, so that it is recorded once, and checks nothing."""
    announced = Announced("llm")
    assert announce("llm", "n1", replace(CHANGE, kind="keys")) is True
    assert announced.nodes() == frozenset()


async def test_watch_checks_a_changed_node_at_once():
    """Long before the next round, and no other node."""
    both = replace(decision(), commit=COMMIT, nodes=(granted("a"), granted("b")))
    lost = replace(both, nodes=(granted("a"), verdict("b", Outcome.INVALID_TOKEN)))
    changes = iter([frozenset(), frozenset({"id-b"})])
    asked = []

    def check(before, nodes):
        asked.append((before, nodes))
        return lost

    at_once = AtOnce(lambda: next(changes, frozenset()), check)
    everybody = []
    watch = Watch(
        lambda: everybody.append(1),
        both,
        interval_s=900,
        on_verdict=lambda _: None,
        at_once=at_once,
    )
    task = asyncio.create_task(watch.run())
    async with asyncio.timeout(10):
        while watch.snapshot()["approved"]:
            await asyncio.sleep(0.05)
    task.cancel()
    assert asked == [(both, {"id-b"})]
    assert everybody == []


def test_announced_returns_later_what_a_silent_store_held_up(kv_store):
    """What was announced is returned when it answers again."""
    announced = Announced("llm")
    assert announce("llm", "n1", CHANGE) is True
    kv_store.is_lost = True
    assert announce("llm", "n2", CHANGE) is False
    assert announced.nodes() == frozenset()
    kv_store.is_lost = False
    assert announced.nodes() == {"n1"}


def test_look_until_change_ends_with_the_first_change(tmp_path, monkeypatch):
    """What it is compared with comes from the look before, so nothing is missed between two."""
    monkeypatch.setattr(file_watch, "LOOK_S", 0.01)
    token = tmp_path / "token"
    token.write_text("one")
    config = AccessConfig(token_file=str(token))
    first = file_watch.look_until_change(config, None, 60)
    assert first.changes == ()
    assert file_watch.look_until_change(config, first.stamps, 0.05) == first
    token.write_text("another")
    second = file_watch.look_until_change(config, first.stamps, 60)
    assert [(each.kind, each.path) for each in second.changes] == [("token", str(token))]
    token.unlink()
    (gone,) = file_watch.look_until_change(config, second.stamps, 60).changes
    assert gone.stamp == file_watch.GONE
