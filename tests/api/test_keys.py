"""The file of API keys: hashes and what each key may do, as fresh as a second."""

import asyncio
import os
import threading
import weakref
from datetime import UTC, datetime

import pytest

from serve_app.api.keys import MAX_LABELS, OTHER, ApiKeys, Key
from serve_app.errors import ConfigError
from serve_app.protocol import Priority
from tests.api.harness import API_KEY as KEY
from tests.api.harness import Service, hashed


async def until_allowed(keys, key):
    """Wait for the file to be read again, or fail."""
    async with asyncio.timeout(5):
        while not keys.find(key):
            await asyncio.sleep(0.01)


async def test_api_keys_take_a_changed_file_without_a_restart(key_file):
    """A new key works and a removed one does not."""
    keys = ApiKeys(str(key_file), check_interval_s=0)
    assert keys.find(KEY)
    key_file.write_text(f"{hashed('new')}\n")
    await until_allowed(keys, "new")
    assert not keys.find(KEY)


async def test_api_keys_end_a_revoked_one_where_nobody_asks(key_file):
    """Each ingress looks by itself: the first request after a quiet hour is refused, too."""
    keys = [ApiKeys(str(key_file), check_interval_s=0.05) for _ in range(2)]
    assert all(each.find(KEY) for each in keys)
    key_file.write_text(f"{hashed('new')}\n")
    await asyncio.sleep(0.5)  # without a request
    assert [each.find(KEY) for each in keys] == [None, None]


@pytest.mark.parametrize("fault", ["gone", "broken", "fifo", "endless"])
async def test_api_keys_keep_the_last_ones_when_a_file_breaks(key_file, fault, capfd):
    """A half-written or missing file neither opens the door nor locks everybody out."""
    keys = ApiKeys(str(key_file), check_interval_s=0)
    other = key_file.with_name("other")  # put in place whole: what is empty lets nobody in
    if fault == "fifo":
        os.mkfifo(other)
    elif fault == "endless":
        other.symlink_to("/dev/zero")
    elif fault == "broken":
        other.write_text("half a ha")
    if fault == "gone":
        key_file.unlink()
    else:
        other.replace(key_file)
    await asyncio.sleep(0.2)
    assert keys.find(KEY)
    assert not keys.find("half a ha")
    assert "keys.failed" in capfd.readouterr().out
    key_file.unlink(missing_ok=True)
    key_file.write_text(hashed("new"))
    await until_allowed(keys, "new")
    assert not keys.find(KEY)


def test_api_keys_read_a_file_that_has_been_written(key_file):
    """One that an editor has just emptied locks nobody out; one that stays empty does."""
    keys = ApiKeys(str(key_file), check_interval_s=3600)
    for text in ("", f"{hashed('other')}\n"):  # while it is written
        key_file.write_text(text)
        keys.refresh()
        assert keys.find(KEY)
    keys.refresh()
    assert keys.find("other")
    assert not keys.find(KEY)
    key_file.write_text("")
    keys.refresh()
    assert keys.find("other")
    keys.refresh()
    assert not keys.find("other")


async def test_api_keys_end_their_thread_with_them(key_file):
    """An application that is gone leaves nothing that looks at files."""
    keys = ApiKeys(str(key_file), check_interval_s=0)
    watching = [t for t in threading.enumerate() if t.name == "serve-app-keys"]
    assert watching
    gone = weakref.ref(keys)
    del keys
    async with asyncio.timeout(5):
        while gone() is not None:
            await asyncio.sleep(0.01)


async def test_api_keys_do_not_read_the_file_for_each_request(key_file):
    """Between two looks the keys are those of the last one."""
    keys = ApiKeys(str(key_file), check_interval_s=60)
    key_file.write_text("")
    await asyncio.sleep(0.1)
    assert keys.find(KEY)


async def test_api_keys_of_an_empty_file_let_nobody_in(tmp_path):
    """Keys are asked for and none exists."""
    path = tmp_path / "keys"
    path.write_text("# none yet\n")
    assert not ApiKeys(str(path)).find("")


def test_api_keys_of_a_wrong_file_stop_the_start(tmp_path):
    """The message names the file, the line and the fix; never the line's text."""
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be read"):
        ApiKeys(str(tmp_path))
    path = tmp_path / "keys"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="not a file"):
        ApiKeys(str(path))
    path.unlink()
    path.write_text("#" * 5_000_000)
    with pytest.raises(ConfigError, match="over 4194304 bytes"):
        ApiKeys(str(path))
    path.write_text(f"{hashed(KEY)}\nplain-text-key\n")
    with pytest.raises(ConfigError, match=r"line 2.*sha256sum") as caught:
        Service(api_keys_file=str(path))
    assert "plain-text-key" not in caught.value.message
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        ApiKeys(str(path))


def read(tmp_path, text):
    """Return what a file says, by the number of its key."""
    path = tmp_path / "keys"
    path.write_text(text)
    keys = ApiKeys(str(path))
    return lambda number: keys.find(str(number))


def lines(*fields):
    return "\n".join(f"{hashed(str(number))} {text}" for number, text in enumerate(fields))


def test_api_keys_say_what_a_key_may_do(tmp_path):
    """Every field, in any order, and a note behind a `#`; what is left out is no limit."""
    find = read(
        tmp_path,
        lines(
            "admin name=team-a tpm=9000 rpm=60 streams=8 priority=low expires=2030-02-01 # to Ann",
            "name=b expires=2030-02-01T12:30+02:00",
            "priority=HIGH name=c",
        ),
    )
    expires = datetime(2030, 2, 1, tzinfo=UTC)
    assert find(0) == Key("team-a", 60, 9000, 8, Priority.LOW, expires, admin=True, label="team-a")
    assert find(1) == Key("b", expires=datetime(2030, 2, 1, 10, 30, tzinfo=UTC), label="b")
    assert find(2).priority is Priority.HIGH
    assert not any(find(number).is_expired for number in range(3))


def test_api_keys_with_a_note_have_no_limits(tmp_path):
    """As every file had them before; no word of a note gives a right."""
    find = read(tmp_path, lines("admin of the lab", "", "# name=x"))
    for number in range(3):
        name = f"key:{hashed(str(number))[:8]}"
        assert find(number) == Key(name, label=name)


def test_api_keys_of_one_name_share_their_limits(tmp_path):
    """The old key and the new one, while a key is replaced; their ends may differ."""
    find = read(tmp_path, lines("name=a rpm=5 expires=2020-01-01", "name=a rpm=5", "name=b"))
    assert find(0).is_expired
    assert not find(1).is_expired
    assert find(0).limits == find(1).limits


def test_api_keys_have_labels_for_the_first_hundred_names(tmp_path):
    """Each ingress the same ones; the rest have one label."""
    find = read(tmp_path, lines(*(f"name=n{number // 2}" for number in range(2 * MAX_LABELS + 4))))
    labels = {find(number).label for number in range(2 * MAX_LABELS + 4)}
    assert len(labels) == MAX_LABELS + 1
    assert find(2 * MAX_LABELS - 1).label == f"n{MAX_LABELS - 1}"
    assert find(2 * MAX_LABELS).label == OTHER


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (lines("name=a rmp=5"), "line 1: has a field twice, or one that is not known; known are"),
        (lines("name=a name=b"), "line 1: has a field twice"),
        (lines("a note", "name=a for Ann"), "line 2: has a field twice"),
        (lines("rpm=5"), "line 1: has fields and no name"),
        (lines("name=a rpm=0"), "line 1: rpm must be a whole number"),
        (lines("name=a tpm=1e6"), "line 1: tpm must be a whole number"),
        (lines("name=a streams=-1"), "line 1: streams must be a whole number"),
        (lines("name=a priority=urgent"), "line 1: priority must be high, normal or low"),
        (lines("name=a expires=soon"), "line 1: expires must be a date as"),
        (lines("name=a expires=2030-13-01"), "line 1: expires must be a date as"),
        (lines("name=a admin=no"), "line 1: admin must be a word without a value"),
        (lines("name=a/b"), "line 1: name must be"),
        (lines("name=other"), "line 1: name must be"),
        (lines("name=a rpm=5", "name=a rpm=6"), "line 2: has other limits"),
        (f"{hashed('x')} name=a\n{hashed('x')} name=b", "line 2: says something else"),
    ],
)
def test_api_keys_with_a_wrong_field_stop_the_start(tmp_path, text, message):
    """The message has the line's number, and nothing of the line but a field's name."""
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        ApiKeys(str(path))
    assert not any(word in caught.value.message for word in ("rmp", "urgent", "Ann", "soon", "1e6"))
    assert not any(line[:8] in caught.value.message for line in text.splitlines())
    assert caught.value.param == "api.api_keys_file"


async def test_api_keys_keep_the_last_ones_when_a_field_is_wrong(key_file, capfd):
    """The log has the line that is wrong."""
    keys = ApiKeys(str(key_file), check_interval_s=0)
    key_file.write_text(lines("name=a", "name=b rpm=many"))
    await asyncio.sleep(0.2)
    assert keys.find(KEY)
    assert not keys.find("0")
    assert "line 2: rpm must be a whole number" in capfd.readouterr().out
