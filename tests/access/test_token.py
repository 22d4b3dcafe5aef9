"""Which token is sent, from where, and what is wrong with it."""

import base64
import hashlib
import os
import pickle
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._headers import get_token_to_send

from serve_app.access.token import Token, resolve_token
from serve_app.access.verdict import Outcome
from serve_app.config import AccessConfig
from tests.access.cases import fake_token

DEFAULT = AccessConfig()


@pytest.fixture(autouse=True)
def bare_process(monkeypatch, tmp_path):
    """Start without any token: own home, own token path, no variables."""
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING_FACE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    (tmp_path / "hf").mkdir()


def sent(resolved):
    return None if resolved.token is None else resolved.token.reveal()


def stored(value: str) -> Path:
    path = Path(constants.HF_TOKEN_PATH)
    path.write_text(value)
    return path


def test_resolve_token_finds_none_anywhere_without_a_fault():
    """A public repository needs none."""
    resolved = resolve_token(DEFAULT)
    assert (resolved.token, resolved.fault) == (None, None)
    assert (resolved.report.source, resolved.report.fingerprint) == ("none", None)


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
@pytest.mark.parametrize("around", ["{}", "{}\n", "  {} \r\n"])
def test_resolve_token_from_variables_as_huggingface_hub_sends_them(monkeypatch, name, around):
    """White space around the value does no harm there, so it does none here."""
    token = fake_token()
    monkeypatch.setenv(name, around.format(token))
    resolved = resolve_token(DEFAULT)
    assert sent(resolved) == get_token_to_send(None) == token
    assert resolved.report.source == f"env:{name}"
    assert resolved.report.fingerprint == hashlib.sha256(token.encode()).hexdigest()[:8]
    assert resolved.report.warnings == ()


@pytest.mark.parametrize(
    ("hf_token", "legacy", "file", "source"),
    [
        ("one", "two", "three", "env:HF_TOKEN"),
        ("", "two", "three", "env:HUGGING_FACE_HUB_TOKEN"),
        (" ", "two", "three", "file"),
        (None, None, "three", "file"),
        (None, "two", "", "env:HUGGING_FACE_HUB_TOKEN"),
        (None, None, " \n", "none"),
        (None, None, None, "none"),
    ],
)
def test_resolve_token_in_the_order_of_huggingface_hub(monkeypatch, hf_token, legacy, file, source):
    """Of several tokens the one that is named is the one that is sent."""
    for name, value in (("HF_TOKEN", hf_token), ("HUGGING_FACE_HUB_TOKEN", legacy)):
        if value is not None:
            monkeypatch.setenv(name, value)
    if file is not None:
        stored(file)
    resolved = resolve_token(DEFAULT)
    assert sent(resolved) == get_token_to_send(None)
    assert resolved.report.source.startswith(source)


def test_resolve_token_with_implicit_tokens_switched_off(monkeypatch):
    """Then huggingface_hub sends nothing, and we say why."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("HF_TOKEN", fake_token())
    resolved = resolve_token(DEFAULT)
    assert sent(resolved) is get_token_to_send(None) is None
    assert "HF_HUB_DISABLE_IMPLICIT_TOKEN" in resolved.report.warnings[0]


def test_resolve_token_prefers_a_configured_file_and_reads_it_again(monkeypatch, tmp_path):
    """Over every variable; a rotated secret is seen at the next check; `~` is the home."""
    monkeypatch.setenv("HF_TOKEN", fake_token())
    config = AccessConfig(token_file="~/secret")
    for _ in range(2):
        token = fake_token()
        (tmp_path / "secret").write_text(token + "\n")
        resolved = resolve_token(config)
        assert sent(resolved) == token
        assert resolved.report.source == "file:~/secret"


def test_resolve_token_prefers_a_configured_variable(monkeypatch):
    """It also works where implicit tokens are off, because it is explicit."""
    token = fake_token()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("HF_TOKEN", fake_token())
    monkeypatch.setenv("LLAMA_TOKEN", token)
    resolved = resolve_token(AccessConfig(token_env="LLAMA_TOKEN"))
    assert (sent(resolved), resolved.report.source) == (token, "env:LLAMA_TOKEN")


def test_resolve_token_reports_a_configured_variable_that_is_not_set(monkeypatch):
    """The usual order follows, with a note."""
    monkeypatch.setenv("HF_TOKEN", fake_token())
    resolved = resolve_token(AccessConfig(token_env="LLAMA_TOKEN"))
    assert resolved.report.source == "env:HF_TOKEN"
    assert "LLAMA_TOKEN, which is not set" in resolved.report.warnings[0]


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("", "is empty"),
        ("  \n ", "is empty"),
        ("{}\n{}", "more than one line"),
        ("{}\r\n# comment", "more than one line"),
        ('"{}"', "quotes"),
        ("'{}'", "quotes"),
        ("“{}”", "quotes"),
        ("None", "nothing was filled in"),
        ("null", "nothing was filled in"),
        ("Bearer {}", "words of a header"),
        ("Authorization: Bearer {}", "words of a header"),
        ("HF_TOKEN={}", "whole assignment"),
        ("export HF_TOKEN={}", "whole assignment"),
        ("${{HF_TOKEN}}", "placeholder"),
        ("$HF_TOKEN", "placeholder"),
        ("<your token>", "placeholder"),
        ("{}é", "not ASCII"),
        ("\ufeff{}", "not ASCII"),
        ("{}\x00", "control characters"),
        ("hf_ {}", "spaces"),
    ],
)
def test_resolve_token_reports_shape_faults_before_any_request(tmp_path, raw, words):
    """The message says what is wrong and where, and never shows the value."""
    token = fake_token()
    file = tmp_path / "secret"
    file.write_bytes(raw.format(token, token).encode())
    resolved = resolve_token(AccessConfig(token_file=str(file)))
    assert resolved.token is None
    assert resolved.fault.outcome is Outcome.MALFORMED_TOKEN
    assert words in resolved.fault.message
    assert f"file:{file}" in resolved.fault.message
    assert token not in repr(resolved)


@pytest.mark.parametrize("around", ["{}", "{}\n", "  {}"])
@pytest.mark.parametrize(("times", "prefix"), [(1, "hf_"), (2, "hf_"), (1, "api_org_")])
def test_resolve_token_reports_a_token_that_was_encoded_twice(tmp_path, around, times, prefix):
    """The `data:` of a Kubernetes Secret is base64 already; who encodes by hand does it again."""
    value = around.format(fake_token().replace("hf_", prefix))
    for _ in range(times):
        value = base64.b64encode(value.encode()).decode()
    for spelling in (value, value.rstrip("=")):
        (tmp_path / "secret").write_text(spelling)
        resolved = resolve_token(AccessConfig(token_file=str(tmp_path / "secret")))
        assert resolved.fault.outcome is Outcome.MALFORMED_TOKEN
        assert "the Secret was encoded twice" in resolved.fault.message
        assert value[:20] not in repr(resolved)


def test_resolve_token_sends_a_token_that_only_looks_like_base64(tmp_path):
    """A mirror's own tokens may be anything."""
    (tmp_path / "secret").write_text("bm90aGluZyBvZiB0aGUgSHVi")
    assert resolve_token(AccessConfig(token_file=str(tmp_path / "secret"))).fault is None


@pytest.mark.parametrize("raw", ["{}\n{}", '"{}"', "Bearer {}"])
def test_resolve_token_reports_shape_faults_of_the_stored_login_and_of_variables(monkeypatch, raw):
    """Two lines are glued together by huggingface_hub; the result would be garbage."""
    value = raw.format(fake_token(), fake_token())
    stored(value)
    assert resolve_token(DEFAULT).fault.outcome is Outcome.MALFORMED_TOKEN
    monkeypatch.setenv("HF_TOKEN", value)
    resolved = resolve_token(DEFAULT)
    assert resolved.fault.outcome is Outcome.MALFORMED_TOKEN
    assert "env:HF_TOKEN" in resolved.fault.message


def test_resolve_token_takes_no_mounted_folder(tmp_path):
    """A Kubernetes secret mounts as a directory; so may the stored login."""
    folder = tmp_path / "secret"
    folder.mkdir()
    resolved = resolve_token(AccessConfig(token_file=str(folder)))
    assert resolved.fault.outcome is Outcome.MALFORMED_TOKEN
    assert "is a directory" in resolved.fault.message
    Path(constants.HF_TOKEN_PATH).mkdir()
    assert "is a directory" in resolve_token(DEFAULT).fault.message


def test_resolve_token_has_none_when_a_configured_file_is_absent(tmp_path):
    """It was asked for, so another token does not take its place."""
    resolved = resolve_token(AccessConfig(token_file=str(tmp_path / "absent")))
    assert resolved.fault.outcome is Outcome.NO_TOKEN
    assert "does not exist on this node" in resolved.fault.message


def test_resolve_token_reports_a_file_that_may_not_be_read(monkeypatch, tmp_path):
    """The message says whose permission is lacking, whoever runs this test."""
    file = tmp_path / "secret"
    file.write_text(fake_token())

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    resolved = resolve_token(AccessConfig(token_file=str(file)))
    assert resolved.fault.outcome is Outcome.MALFORMED_TOKEN
    assert "may not be read" in resolved.fault.message


def test_resolve_token_takes_no_binary_file(tmp_path):
    """It would make huggingface_hub raise UnicodeDecodeError at every call."""
    file = tmp_path / "secret"
    file.write_bytes(b"\xff\xfe\x00\x80")
    resolved = resolve_token(AccessConfig(token_file=str(file)))
    assert "not a text file" in resolved.fault.message


def test_resolve_token_reports_oidc_without_an_identity(monkeypatch):
    """huggingface_hub would raise at every call, even with a good HF_TOKEN."""
    monkeypatch.setenv("HF_OIDC_RESOURCE", "acme/tiny")
    monkeypatch.setenv("HF_TOKEN", fake_token())
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    resolved = resolve_token(DEFAULT)
    assert resolved.fault.outcome is Outcome.NO_TOKEN
    assert resolved.report.source == "oidc"
    assert "HF_OIDC_RESOURCE is set" in resolved.fault.message


def test_resolve_token_names_rivals_without_their_values(monkeypatch, tmp_path):
    """A second variable, a stored login and a git credential that disagree are noted."""
    values = [fake_token() for _ in range(4)]
    monkeypatch.setenv("HF_TOKEN", values[0])
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", values[1])
    stored(values[2])
    (tmp_path / ".git-credentials").write_text(f"https://user:{values[3]}@huggingface.co\n")
    resolved = resolve_token(DEFAULT)
    text = "\n".join(resolved.report.warnings)
    assert len(resolved.report.warnings) == 3
    for words in ("HUGGING_FACE_HUB_TOKEN holds a different", "stored login", "git has a diff"):
        assert words in text
    assert not any(value in repr(resolved) for value in values)


def test_resolve_token_sees_no_conflict_in_the_same_token_twice(monkeypatch, tmp_path):
    """Two places with one value agree."""
    token = fake_token()
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", token)
    stored(token + "\n")
    (tmp_path / ".git-credentials").write_text(f"https://user:{token}@huggingface.co\n")
    assert resolve_token(DEFAULT).report.warnings == ()


def test_token_neither_prints_nor_pickles():
    """Only `reveal` gives the value."""
    value = fake_token()
    token = Token(value)
    assert value not in f"{token} {token!r} {[token]}"
    assert token.fingerprint in repr(token)
    with pytest.raises(TypeError, match="is not pickled"):
        pickle.dumps(token)
