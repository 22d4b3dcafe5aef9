"""Names of a listing: refused outright, refused as a file, or taken."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.checkpoint.names import conflict, escape_fault, shown, store_fault

GOOD = [
    "config.json", "model-00001-of-00002.safetensors", "LICENSE", "USE_POLICY.md", "a/b/c.json",
    "sub dir/x.txt", "naïve.json", "模型.safetensors", "-rf.json", "a..b", "x...y/z", "n" * 255,
]  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_store_fault_takes_names_of_real_repositories(name):
    """Spaces, other scripts, dots within a name."""
    assert escape_fault(name) is None
    assert store_fault(name) is None


@pytest.mark.parametrize(
    "name",
    ["", "/", "/etc/passwd", "..", ".", "../x", "x/..", "x/../y", "./x", "x/./y", "x//y", "x/",
     "x\0", "\0", "\ud800", None, 3, b"x", ["x"], "//server/share", "x/../../../../etc/cron.d/y"],
)  # fmt: skip
def test_escape_fault_of_names_that_lead_out(name):
    """No Git repository holds one."""
    assert escape_fault(name)


@pytest.mark.parametrize(
    "name",
    ["x\\y", "..\\x", "C:\\x", "a\tb", "a\rb", "a\x1b[2J", "a\u202eb", "a\u200bb", "con",
     "CON.json", "nul.txt", "COM1", "lpt9.json", "x/aux/y", ".hidden", "x/.git/config", ".tmp-1",
     "~x", "x.", "x ", " x", "n" * 256, "é" * 128, "/".join(["d"] * 17), "/".join(["d" * 200] * 6)],
)  # fmt: skip
def test_store_fault_of_odd_names(name):
    """They may be in a repository, and then they are left alone."""
    assert store_fault(name)


@pytest.mark.parametrize(
    "names",
    [["a", "A"], ["a.json", "A.JSON"], ["é", "e\u0301"], ["ß", "SS"], ["ﬁ", "FI"], ["a", "a"],
     ["a", "a/b"], ["A", "a/b"], ["x/y", "x/y/z", "q"], ["K.json", "\u212a.json"]],
)  # fmt: skip
def test_conflict_of_names_that_exclude_each_other(names):
    """One file system holds both for one; or a file would have to be a folder."""
    assert conflict(names)
    assert conflict(reversed(names))


def test_conflict_of_names_beside_each_other_is_none():
    """A real repository."""
    assert conflict(GOOD) is None
    assert conflict(["a/b", "a/c", "ab", "b"]) is None


@given(st.text(max_size=30))
def test_store_fault_takes_only_what_stays_below_its_folder(name):
    """Whatever the letters."""
    if store_fault(name) is not None:
        return
    parts = name.split("/")
    assert all(parts)
    assert not {".", ".."} & set(parts)
    assert name.isprintable()


@given(st.text() | st.integers() | st.none())
def test_shown_is_short_and_printable(name):
    """Whatever it is, it moves no cursor and breaks no line."""
    assert len(shown(name)) <= 80
    assert shown(name).isascii()
    assert shown(name).isprintable()
