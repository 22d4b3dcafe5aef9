"""Repositories: hashes as Git and Git LFS make them, commits from content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from scripts.local_hub import Repo
from scripts.local_hub.repos import RepoFile


def test_repo_file_has_the_git_object_id():
    """A small file has the id that `git hash-object` gives it."""
    assert RepoFile("a.txt", b"hello\n").blob_id == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_repo_file_that_is_large_is_a_pointer():
    """A large file's ETag is its SHA-256, and its Git id that of its LFS pointer."""
    file = RepoFile("model.safetensors", b"hello\n")
    sha256 = hashlib.sha256(b"hello\n").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize 6\n".encode()
    assert (file.etag, file.pointer_size) == (sha256, len(pointer))
    blob = b"blob %d\0" % len(pointer) + pointer
    assert file.blob_id == hashlib.sha1(blob).hexdigest()


def test_repo_file_is_large_by_size(tmp_path: Path):
    """Over 10 MiB any file is large; the suffix decides below."""
    big = tmp_path / "vocab.json"
    with big.open("wb") as file:
        file.truncate((10 << 20) + 1)
    assert RepoFile("vocab.json", big).is_large
    assert not RepoFile("vocab.json", b"{}").is_large
    assert RepoFile("x/adapter_model.bin", b"").is_large


def test_repo_commit_comes_from_the_content():
    """Equal content under one name is one commit; other content or name is another."""
    commits = {
        Repo("a/b", {"x": b"1"}).sha,
        Repo("a/b", {"x": b"1"}).sha,
        Repo("a/b", {"x": b"2"}).sha,
        Repo("a/c", {"x": b"1"}).sha,
        Repo("a/b", {"y": b"1"}).sha,
    }
    assert len(commits) == 4
    assert {len(commit) for commit in commits} == {40}


def test_repo_with_given_revisions():
    """Commits that are given are used as they are; the first stands in for a missing main."""
    repo = Repo("a/b", {"x": b"1"}, revisions={"v1": "1" * 40, "v2": "2" * 40})
    assert repo.sha == "1" * 40
    assert repo.commit("v2") == repo.commit("2" * 40) == "2" * 40
    assert repo.commit("main") is None


def test_from_dir_leaves_hidden_files_out(tmp_path: Path):
    """A directory is held with its folders, without `.git` and the like."""
    for name in ("config.json", "sub/a.txt", ".git/config", "sub/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    repo = Repo.from_dir("a/b", tmp_path)
    assert list(repo.files(repo.sha)) == ["config.json", "sub/a.txt"]
