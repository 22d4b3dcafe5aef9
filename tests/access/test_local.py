"""A directory instead of a repository."""

import json

import pytest

from serve_app.access.local import check_directory
from serve_app.access.verdict import Outcome
from tests.access.cases import sharded_files, single_files

SHARD = "model-00002-of-00002.safetensors"


def filled(directory, files):
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("files", [single_files(), sharded_files()], ids=["single", "sharded"])
def test_check_directory_grants_a_complete_one(tmp_path, files):
    """Config, tokenizer, index, and every shard with a whole header."""
    assert check_directory(str(filled(tmp_path, files))).outcome is Outcome.GRANTED


@pytest.mark.parametrize("name", [*sharded_files()])
def test_check_directory_needs_every_file(tmp_path, name):
    """Whichever is absent, the message names it or its kind."""
    filled(tmp_path, sharded_files(missing=name))
    verdict = check_directory(str(tmp_path))
    assert verdict.outcome is Outcome.WEIGHTS_MISSING
    assert name.partition(".")[0] in verdict.hub_message
    assert str(tmp_path) in verdict.remedy


@pytest.mark.parametrize("name", sorted({*sharded_files()} - {"tokenizer.json"}))
def test_check_directory_needs_to_read_every_file(tmp_path, name):
    """A download that broke off leaves files like these; a tokenizer is its library's to judge."""
    filled(tmp_path, sharded_files())
    (tmp_path / name).write_bytes(b"\0\0\0")
    assert check_directory(str(tmp_path)).outcome is Outcome.WEIGHTS_MISSING


def test_check_directory_notices_weights_that_are_cut_off(tmp_path):
    """The header is whole, the last tensor is not."""
    filled(tmp_path, sharded_files())
    content = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(content[:-1])
    verdict = check_directory(str(tmp_path))
    assert verdict.outcome is Outcome.WEIGHTS_MISSING
    assert "cut off" in verdict.hub_message


@pytest.mark.parametrize(
    "header", [b"{" + b"x" * 9, b"[]", json.dumps({"w": {"data_offsets": [0, 99]}}).encode()]
)
def test_check_directory_wants_headers_that_make_sense(tmp_path, header):
    """No JSON object, or tensors that end behind the file."""
    filled(tmp_path, sharded_files())
    (tmp_path / SHARD).write_bytes(len(header).to_bytes(8, "little") + header)
    assert check_directory(str(tmp_path)).outcome is Outcome.WEIGHTS_MISSING


def test_check_directory_without_a_directory(tmp_path):
    """The path is named; a file is no directory."""
    for path in (tmp_path / "none", filled(tmp_path, {"file": b""}) / "file"):
        verdict = check_directory(str(path))
        assert verdict.outcome is Outcome.WEIGHTS_MISSING
        assert str(path) in verdict.hub_message
