"""`serve-app check` of a model on ModelScope, and its weights on their way to a node."""

import json

import pytest
import yaml
from huggingface_hub import constants
from werkzeug.wrappers import Response

from serve_app.access.digest import directory_digest
from serve_app.access.hub.probe import check_here
from serve_app.cli.main import main
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import ModelLoadError
from serve_app.weights.fetch import fetch
from tests.access.cases import sharded_files
from tests.ports import free_port
from tests.signing import write_files
from tests.stores import MODELSCOPE_URL, local_modelscope

TOKEN = "ms-0123456789abcdef"
SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    for name in ("RAY_ADDRESS", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_another_site_altogether")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def site():
    with local_modelscope(sharded_files()) as running:
        running.known[TOKEN] = "alice"
        yield running


def check(tmp_path, capsys, endpoint, **model):
    """Return exit code, what a person is told as one line, and the node's row."""
    args = {
        "model": {"url": MODELSCOPE_URL, **model},
        "access": {"endpoint": endpoint, "timeout_s": 2, "deadline_s": 9},
        "replica": {"num_gpus": 0},
    }
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    config = tmp_path / "app.yaml"
    config.write_text(yaml.safe_dump({"applications": [app]}))
    code = main(["check", str(config), "--this-node", "--json"])
    (row,) = json.loads(capsys.readouterr().out)["nodes"]
    assert TOKEN not in json.dumps(row)
    return code, f"{row['hub_message'] or ''} {row['remedy']}", row


def test_check_modelscope_public(site, tmp_path, capsys):
    """Without a token; the Hub's is sent nowhere."""
    code, said, row = check(tmp_path, capsys, site.url)
    assert (code, row["outcome"]) == (0, "granted"), said
    assert row["token"]["source"] == "none"
    assert {token for _, token in site.seen} == {""}


def test_check_modelscope_private(site, monkeypatch, tmp_path, capsys):
    """The account is asked for first; where large files lie, no token is sent."""
    site.readers = {"alice"}
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    code, said, row = check(tmp_path, capsys, site.url)
    assert (code, row["outcome"]) == (0, "granted"), said
    assert row["token"]["account"] == "alice"
    assert row["token"]["source"] == "env:MODELSCOPE_API_TOKEN"
    assert site.seen[0][0].endswith("/openapi/v1/users/me")
    elsewhere = [token for url, token in site.seen if not url.startswith(site.url)]
    assert elsewhere
    assert set(elsewhere) == {""}


def test_check_modelscope_token_that_it_ignores(site, monkeypatch, tmp_path, capsys):
    """A public repository would be read all the same, by nobody whom the config means."""
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-mistyped")
    code, said, row = check(tmp_path, capsys, site.url)
    assert (code, row["outcome"]) == (3, "invalid_token"), said
    assert "bad token" in said


def test_check_modelscope_refusal(site, monkeypatch, tmp_path, capsys):
    """Not there and no permission are one answer, shown in the site's words."""
    site.readers = {"bob"}
    for token in (None, TOKEN):
        if token:
            monkeypatch.setenv("MODELSCOPE_API_TOKEN", token)
        code, said, row = check(tmp_path, capsys, site.url)
        assert (code, row["outcome"]) == (3, "content_blocked")
        assert "404: Model acme/tiny not exist, or you have no permission" in said
        assert "does not tell apart" in said


def files_say(**changes):
    def change(site):
        listed = site.listed()
        listed[-1] |= changes
        payload = {"Code": 200, "Success": True, "Data": {"Files": listed}}
        answer = Response(json.dumps(payload), content_type="application/json")
        site.before = lambda request: answer if request.path.endswith("/files") else None

    return change


def cut(site):
    site.files |= {f"assets/{number}": b"" for number in range(3000)}


def other_bytes(site):
    def answer(request):
        if request.args.get("FilePath") != "config.json":
            return None
        content = b" " * len(site.files["config.json"])
        place = {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"}
        return Response(content, 206, headers=place)

    site.before = answer


UNPROVEN = {
    "cut-listing": (cut, (4, "unknown", "cut at 3,000 entries")),
    "no-hash": (files_say(Sha256=""), (4, "unknown", "no SHA-256 of")),
    "no-listing": (files_say(Path=None), (4, "unknown", "is no text")),
    "other-bytes": (other_bytes, (3, "digest_mismatch", "'config.json' came with other bytes")),
}


@pytest.mark.parametrize(("change", "row"), UNPROVEN.values(), ids=UNPROVEN.keys())
def test_check_modelscope_that_proves_nothing(site, tmp_path, capsys, change, row):
    """What is cut, not hashed, or other than listed blocks."""
    change(site)
    code, said, found = check(tmp_path, capsys, site.url)
    assert (code, found["outcome"]) == row[:2], said
    assert row[2] in said


def test_check_modelscope_that_is_away(site, tmp_path, capsys):
    """A closed port is no refusal: exit 4."""
    code, _, row = check(tmp_path, capsys, f"http://127.0.0.1:{free_port()}")
    assert (code, row["outcome"]) == (4, "hub_unreachable")


def test_check_modelscope_digest(site, tmp_path, capsys):
    """It states the hash of every file, so `model.digest` is that of the same directory."""
    wanted = directory_digest(write_files(tmp_path / "copy", sharded_files()))
    assert check(tmp_path, capsys, site.url, digest=wanted)[0] == 0
    code, _, row = check(tmp_path, capsys, site.url, digest="sha256:" + "0" * 64)
    assert (code, row["outcome"]) == (3, "digest_mismatch")


def test_fetch_from_modelscope(site):
    """Every file by its listed SHA-256; a branch that moved is noticed, whatever its name."""
    model, access = ModelConfig(url=f"{MODELSCOPE_URL}@v1"), AccessConfig(endpoint=site.url)
    pin = check_here(model, access).commit
    site.files[SHARD] = site.files[SHARD][:-1] + b"\1"
    with pytest.raises(ModelLoadError, match="since it was pinned"):
        fetch(model, access, pin)
    fetched = fetch(model, access, check_here(model, access).commit)
    for name, raw in site.files.items():
        assert (fetched.directory / name).read_bytes() == raw
