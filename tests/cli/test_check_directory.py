"""`serve-app check` of a model in a directory that each node mounts."""

import json
import os
import threading

import pytest
import yaml

from serve_app.cli.main import main
from tests.access.cases import sharded_files
from tests.signing import Signer, write_files

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def check(tmp_path, capsys, access=None, **model):
    """Return exit code, table as one line, and the outcome."""
    args = {
        "model": {"path": str(tmp_path / "mount"), **model},
        "access": {"deadline_s": 3, **(access or {})},
        "replica": {"num_gpus": 0},
    }
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    config = tmp_path / "app.yaml"
    config.write_text(yaml.safe_dump({"applications": [app]}))
    code = main(["check", str(config), "--this-node", "--json"])
    outcome = json.loads(capsys.readouterr().out)["nodes"][0]["outcome"]
    assert main(["check", str(config), "--this-node"]) == code
    return code, " ".join(capsys.readouterr().out.split()), outcome


def test_check_mounted_directory_granted(tmp_path, capsys):
    """Config, index and the header of each file are read on the node; no Hub is asked."""
    write_files(tmp_path / "mount", sharded_files())
    code, table, outcome = check(tmp_path, capsys)
    assert (code, outcome) == (0, "granted")
    assert "Asked" not in table


def test_check_mounted_directory_lacks_a_shard(tmp_path, capsys):
    """The node that lacks it says which."""
    write_files(tmp_path / "mount", sharded_files(missing=SHARD))
    code, table, outcome = check(tmp_path, capsys)
    assert (code, outcome) == (3, "weights_missing")
    assert SHARD in table


def test_check_mount_that_does_not_answer(tmp_path, capsys):
    """A read that never ends is given up in time; the remedy is about the mount."""
    place = write_files(tmp_path / "mount", sharded_files())
    (place / "config.json").unlink()
    os.mkfifo(place / "config.json")
    try:
        code, table, outcome = check(tmp_path, capsys)
    finally:
        release = threading.Thread(target=(place / "config.json").write_bytes, args=(b"",))
        release.start()
        release.join(5)
    assert (code, outcome) == (3, "weights_unreachable")
    assert "was not read within 2 s" in table
    assert f"See to the mount of {place}" in table


def test_check_mounted_directory_signed_and_tampered(tmp_path, capsys):
    """Every byte counts, and the table says in one sentence which file is another one."""
    signer = Signer(tmp_path)
    demanded = {"signature": {"public_key": str(signer.public)}}
    place = write_files(tmp_path / "mount", signer.signed(sharded_files()))
    code, _, outcome = check(tmp_path, capsys, demanded)
    assert (code, outcome) == (0, "granted")
    weights = bytearray((place / SHARD).read_bytes())
    weights[-1] ^= 1
    (place / SHARD).write_bytes(weights)
    code, table, outcome = check(tmp_path, capsys, demanded)
    assert (code, outcome) == (3, "signature_invalid")
    assert f"Found: {SHARD} has other bytes than were signed" in table
