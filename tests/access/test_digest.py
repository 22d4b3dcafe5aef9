"""The digest of a commit: the same from the Hub's listing and from the bytes, and it blocks."""

import hashlib
import os

import pytest
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access import digest as digests
from serve_app.access.digest import digest_of, directory_digest
from serve_app.access.hub.probe import check_here
from serve_app.access.node_check import prove_here
from serve_app.access.verdict import Outcome
from serve_app.access_config import LicensePolicy
from serve_app.checkpoint.runnable import Loader
from serve_app.cli.main import main
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import ModelLoadError
from serve_app.weights.fetch import fetch
from tests.access.cases import MODEL, access, sharded_files, single_files
from tests.conftest import TINY_REPO

TEXT = b"LLAMA\n"
FILES = sharded_files() | {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": TEXT}
LOADER = Loader(dtype="bfloat16", num_gpus=0)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))


def expected(files):
    """Return the digest as the definition says it."""
    lines = []
    for path, content in sorted(files.items()):
        if path.endswith(".safetensors"):
            lines.append(f"{path}\0sha256:{hashlib.sha256(content).hexdigest()}\n")
        else:
            blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            lines.append(f"{path}\0git-sha1:{blob}\n")
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


DIGEST = expected(FILES)


def wanting(digest):
    return MODEL.model_copy(update={"digest": digest})


def directory(path, files=None):
    path.mkdir(exist_ok=True)
    for name, content in (files or FILES).items():
        (path / name).write_bytes(content)
    return path


def test_digest_of_definition():
    """In the order of the paths' bytes, whatever order they come in."""
    hashes = {"z": "0" * 64, "a/b": "1" * 40, "é": "2" * 40}
    text = f"a/b\0git-sha1:{'1' * 40}\nz\0sha256:{'0' * 64}\né\0git-sha1:{'2' * 40}\n"
    assert digest_of(hashes) == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("xet", [False, True], ids=["plain", "xet"])
@pytest.mark.parametrize("text", [None, (hashlib.sha256(TEXT).hexdigest(),)])
@pytest.mark.parametrize("base", [single_files, sharded_files])
def test_check_here_grants_the_right_digest_in_five_requests(tmp_path, xet, text, base):
    """With the license's text, config.json and the way to the bytes; the other nodes need two."""
    files = FILES | base() if base is sharded_files else base() | {"LICENSE": TEXT}
    files |= {"README.md": FILES["README.md"]}
    with LocalHub([Repo(TINY_REPO, files, xet=xet)]) as hub:
        terms = LicensePolicy(allow=("mit",), text_sha256=text)
        config = access(hub, tmp_path, hub.issue_token()).model_copy(update={"license": terms})
        model = wanting(expected(files))
        verdict = check_here(model, config, loader=LOADER)
        assert (verdict.outcome, verdict.facts.digest) == (Outcome.GRANTED, model.digest)
        assert verdict.hub_requests == sum(entry.origin == "hub" for entry in hub.log) <= 5
        assert sum(entry.bytes_sent for entry in hub.log if entry.origin == "cdn")
        other = check_here(model, config, commit=verdict.commit, hint=verdict, loader=LOADER)
        assert (other.outcome, other.facts) == (Outcome.GRANTED, verdict.facts)
        assert other.hub_requests <= 2


def test_check_here_blocks_another_digest_and_names_both(hub, tmp_path):
    """Before config.json or a byte of weights; the others refuse as the first one does."""
    hub.add_repo(Repo(TINY_REPO, FILES | {"tokenizer.json": b"{ }"}))
    config = access(hub, tmp_path, hub.issue_token())
    verdict = check_here(wanting(DIGEST), config, loader=LOADER)
    assert verdict.outcome is Outcome.DIGEST_MISMATCH
    assert DIGEST in verdict.hub_message
    assert verdict.facts.digest in verdict.hub_message
    assert "serve-app digest" in verdict.remedy
    assert verdict.hub_requests == 2
    assert not any(entry.route == "resolve" for entry in hub.log)


def test_check_here_reports_a_missing_grant_and_no_mismatch(hub, tmp_path):
    """The Hub hides hashes from them; that is no mismatch."""
    config = access(hub, tmp_path, hub.issue_token(Behaviour.pending))
    assert check_here(wanting(DIGEST), config).outcome is Outcome.REQUEST_PENDING


def test_check_here_blocks_a_mirror_that_lists_what_it_cannot_give(tmp_path, monkeypatch):
    """Without the route to the chunk store the file itself is asked for."""
    repo = Repo(TINY_REPO, FILES, xet=True)
    with LocalHub([repo]) as hub:
        config = access(hub, tmp_path, hub.issue_token())
        monkeypatch.setattr("scripts.local_hub.hub.Hub._xet_token", _no_such_route)
        hub.drop_headers("link", "x-xet-hash")
        verdict = check_here(wanting(DIGEST), config)
        assert verdict.outcome is Outcome.GRANTED, verdict
        assert any(entry.origin == "cdn" for entry in hub.log)


def _no_such_route(hub, call):
    from scripts.local_hub.behaviours import ENTRY_NOT_FOUND
    from scripts.local_hub.hub import Refused

    raise Refused(ENTRY_NOT_FOUND)


def test_directory_digest_is_that_of_its_commit(tmp_path):
    """From the bytes; one byte more and it is another one."""
    place = directory(tmp_path / "model")
    (place / ".cache" / "huggingface").mkdir(parents=True)
    (place / ".cache" / "huggingface" / "note").write_text("left by the download")
    model = ModelConfig(path=str(place), digest=DIGEST)
    verdict = check_here(model, AccessConfig())
    assert (verdict.outcome, verdict.facts.digest) == (Outcome.GRANTED, DIGEST)
    assert fetch(model, AccessConfig(), None).directory == place
    (place / "tokenizer.json").write_bytes(b"{ }")
    assert check_here(model, AccessConfig()).outcome is Outcome.DIGEST_MISMATCH
    with pytest.raises(ModelLoadError, match=r"is not loaded: the files have the digest sha256:"):
        fetch(model, AccessConfig(), None)


def test_directory_digest_reads_gitattributes_for_what_is_large(tmp_path):
    """The last rule that means a file counts, as in Git."""
    rules = b"* -text\n*.json filter=lfs -text\n/config.json -filter\nsub/*.txt filter=lfs\n"
    files = {".gitattributes": rules, "a.json": b"1", "config.json": b"2", "b.safetensors": b"3"}
    place = directory(tmp_path / "model", files)
    (place / "sub").mkdir()
    (place / "sub" / "x.txt").write_bytes(b"4")
    sha256 = {name: hashlib.sha256(c).hexdigest() for name, c in (("a.json", b"1"),)}
    sha256["sub/x.txt"] = hashlib.sha256(b"4").hexdigest()
    small = {n: files[n] for n in (".gitattributes", "config.json", "b.safetensors")}
    blobs = {n: hashlib.sha1(f"blob {len(c)}\0".encode() + c).hexdigest() for n, c in small.items()}
    assert directory_digest(place) == digest_of(sha256 | blobs)


def test_directory_digest_reads_a_file_once_for_as_long_as_it_stays(tmp_path, monkeypatch):
    """By size, times and inode; notes that cannot be read cost reading it again."""
    place = directory(tmp_path / "model")
    assert directory_digest(place) == DIGEST
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_hash", lambda *_args, **_: pytest.fail("read again"))
        assert directory_digest(place) == DIGEST
    (notes,) = (tmp_path / "cache" / ".serve-app" / "hashed").iterdir()
    for damage in (b"", b"[1]", b'{"config.json": 3}'):
        notes.write_bytes(damage)
        assert directory_digest(place) == DIGEST
    shard = place / "model-00001-of-00002.safetensors"
    times = shard.stat()
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert directory_digest(place) != DIGEST


def test_fetch_loads_what_the_digest_covers(hub, tmp_path):
    """The copy's listing has the digest, and no file beside those that it names is read."""
    hub.add_repo(Repo(TINY_REPO, FILES))
    config = access(hub, tmp_path, hub.issue_token(), on_unreachable="allow_cached", timeout_s=1)
    proven = prove_here(wanting(DIGEST), config)
    fetched = fetch(wanting(DIGEST), config, proven.commit)
    assert fetched.directory.is_dir()
    with pytest.raises(ModelLoadError, match=r"model\.digest is sha256:0000"):
        fetch(wanting("sha256:" + "0" * 64), config, proven.commit)
    (fetched.directory / "chat_template.jinja").write_text("{{ planted }}")
    with pytest.raises(ModelLoadError, match=r"are not of the commit: chat_template\.jinja"):
        fetch(wanting(DIGEST), config, proven.commit)


def test_prove_here_takes_a_receipt_only_for_the_same_digest(hub, tmp_path):
    """While the Hub is away the listing that is kept beside the copy says it."""
    hub.add_repo(Repo(TINY_REPO, FILES))
    limits = {"on_unreachable": "allow_cached", "timeout_s": 0.5, "deadline_s": 2}
    config = access(hub, tmp_path, hub.issue_token(), **limits)
    first = prove_here(wanting(DIGEST), config)
    fetch(wanting(DIGEST), config, first.commit)
    hub.stop()
    assert prove_here(wanting(DIGEST), config).outcome is Outcome.GRANTED
    other = prove_here(wanting("sha256:" + "0" * 64), config)
    assert (other.outcome, DIGEST in other.hub_message) == (Outcome.HUB_UNREACHABLE, True)
    assert fetch(wanting(DIGEST), config, first.commit, offline=True).cache_bytes
    hub.start()


def test_digest_command_prints_what_to_write_into_the_config(hub, tmp_path, capsys, monkeypatch):
    """The same from a config, a repository and a directory of its files."""
    repo = Repo(TINY_REPO, FILES)
    hub.add_repo(repo)
    file = tmp_path / "token"
    file.write_text(hub.issue_token())
    config = tmp_path / "app.yaml"
    config.write_text(
        "applications: [{name: llm, import_path: 'serve_app.app:build_app', args: {model: "
        f"{{repo_id: {TINY_REPO}}}, access: {{endpoint: '{hub.url}', token_file: {file}}}}}}}]"
    )
    assert main(["digest", str(config)]) == 0
    assert capsys.readouterr().out == f"{DIGEST}  {TINY_REPO}@{repo.sha}\n"
    place = directory(tmp_path / "model")
    assert main(["digest", str(place)]) == 0
    assert capsys.readouterr().out == f"{DIGEST}  {place}\n"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", file.read_text())
    monkeypatch.setattr("serve_app.access.hub.probe.is_plain_http", lambda _: False)
    assert main(["digest", f"{TINY_REPO}@{repo.sha}"]) == 0
    assert capsys.readouterr().out == f"{DIGEST}  {TINY_REPO}@{repo.sha}\n"
    monkeypatch.setenv("HF_TOKEN", hub.issue_token(Behaviour.pending))
    assert main(["digest", TINY_REPO]) == 3
    assert "request_pending" in capsys.readouterr().err
    assert main(["digest", "what is this?"]) == 2
