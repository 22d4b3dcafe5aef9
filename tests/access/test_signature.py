"""Signatures: who signed which files, at the gate and before a replica loads them."""

import sys

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from huggingface_hub import constants
from pydantic import ValidationError

from scripts.local_hub import LocalHub, Repo
from serve_app import access_config
from serve_app.access import signature as signatures
from serve_app.access.hub.probe import check_here
from serve_app.access.node_check import prove_here
from serve_app.access.verdict import Outcome
from serve_app.access_config import SignatureConfig
from serve_app.checkpoint.runnable import Loader
from serve_app.config import ModelConfig
from serve_app.errors import ModelLoadError
from serve_app.weights.fetch import fetch
from tests.access.cases import MODEL, access, sharded_files, single_files
from tests.conftest import TINY_REPO
from tests.signing import Signer, write_files


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def signer(tmp_path_factory):
    return Signer(tmp_path_factory.mktemp("signer"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return Signer(tmp_path_factory.mktemp("stranger"))


def demanding(hub, tmp_path, signer, **limits):
    """Return the access config of a node that demands a signature."""
    config = access(hub, tmp_path, hub.issue_token(), **limits)
    return config.model_copy(update={"signature": signer.demanded})


@pytest.mark.parametrize("xet", [False, True], ids=["plain", "xet"])
@pytest.mark.parametrize("files", [single_files(), sharded_files()], ids=["single", "sharded"])
def test_probe_grants_a_signed_commit_that_fetch_loads(tmp_path, monkeypatch, signer, files, xet):
    """By five requests or fewer, of other nodes too; the bundle comes with the model."""
    repo = Repo(TINY_REPO, signer.signed(files), xet=xet)
    with LocalHub([repo]) as hub:
        config = demanding(hub, tmp_path, signer)
        first = check_here(MODEL, config, loader=Loader())
        other = check_here(MODEL, config, commit=repo.sha, hint=first, loader=Loader())
        assert (first.outcome, other.outcome) == (Outcome.GRANTED,) * 2
        assert first.hub_requests <= 5
        assert other.hub_requests == 2 + xet
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the loopback store stores none
        assert (fetch(MODEL, config, repo.sha).directory / "model.sig").is_file()


def test_probe_takes_the_license_hash_from_the_signature(tmp_path, signer):
    """Its hash is signed, so that six requests are five."""
    text = {"LICENSE": b"Do what you like.\n"}
    with LocalHub([Repo(TINY_REPO, signer.signed(single_files() | text))]) as hub:
        config = demanding(hub, tmp_path, signer)
        policy = access_config.LicensePolicy(text_sha256=("0" * 64,))
        config = config.model_copy(update={"license": policy})
        verdict = check_here(MODEL, config, loader=Loader())
        assert verdict.outcome is Outcome.LICENSE_NOT_ALLOWED
        found = verdict.facts.license_sha256
        policy = access_config.LicensePolicy(text_sha256=(found,))
        verdict = check_here(MODEL, config.model_copy(update={"license": policy}), loader=Loader())
        assert (verdict.outcome, verdict.hub_requests) == (Outcome.GRANTED, 5)


def tampered(files, name, content):
    return {**files, name: content}


def faults(signer, stranger):
    """Return the files of commits that must not be served, each with the words of the refusal."""
    signed = signer.signed(single_files())
    weights = bytearray(signed["model.safetensors"])
    weights[-1] ^= 1
    return {
        "unsigned": (single_files(), "there is no model.sig"),
        "stranger": (stranger.signed(single_files()), "is not signed by the key in"),
        "no bundle": (tampered(signed, "model.sig", b"{}"), "is no bundle"),
        "weights": (
            tampered(signed, "model.safetensors", bytes(weights)),
            "model.safetensors has other bytes than were signed",
        ),
        "added": (tampered(signed, "chat_template.jinja", b"x"), "does not cover chat_template"),
        "removed": (
            {k: v for k, v in signed.items() if k != "README.md"},
            "covers README.md, which is not there",
        ),
        "ignored and loaded": (
            signer.signed(single_files(), ignore=["config.json"]),
            "does not cover config.json",
        ),
        "shards": (signer.signed(single_files(), shards=True), "lists no SHA-256 of whole files"),
    }


CASES = (
    "unsigned",
    "stranger",
    "no bundle",
    "weights",
    "added",
    "removed",
    "ignored and loaded",
    "shards",
)


@pytest.mark.parametrize("case", CASES)
def test_probe_blocks_what_was_not_signed(tmp_path, signer, stranger, case):
    """In one sentence, on every node, before a byte of the weights."""
    files, words = faults(signer, stranger)[case]
    with LocalHub([Repo(TINY_REPO, files)]) as hub:
        verdict = check_here(MODEL, demanding(hub, tmp_path, signer), loader=Loader())
        assert verdict.outcome is Outcome.SIGNATURE_INVALID
        assert words in verdict.hub_message
        assert "access.signature" in verdict.remedy
        assert not any(entry.origin == "cdn" for entry in hub.log)


@pytest.mark.parametrize("case", CASES)
def test_check_here_blocks_a_directory_that_was_not_signed(tmp_path, signer, stranger, case):
    """A local directory is read whole, at the gate and again by the replica."""
    files, words = faults(signer, stranger)[case]
    place = write_files(tmp_path / "model", files)
    model = ModelConfig(path=str(place))
    config = access_config.AccessConfig(signature=signer.demanded)
    verdict = check_here(model, config)
    assert verdict.outcome is Outcome.SIGNATURE_INVALID
    assert words in verdict.hub_message
    with pytest.raises(ModelLoadError, match="is not loaded"):
        fetch(model, config, None)


def test_check_here_grants_a_signed_directory(tmp_path, signer):
    """Git's own files may lie beside it."""
    place = write_files(tmp_path / "model", signer.signed(single_files()))
    (place / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    model = ModelConfig(path=str(place))
    config = access_config.AccessConfig(signature=signer.demanded)
    verdict = check_here(model, config)
    assert (verdict.outcome, verdict.hub_message) == (Outcome.GRANTED, None)
    assert fetch(model, config, None).directory == place


def test_fetch_compares_bytes_with_the_signature(tmp_path, signer):
    """A small file whose listed hash is not the signed one is found where its bytes are."""
    files = tampered(signer.signed(single_files()), "tokenizer.json", b'{"other": 1}')
    repo = Repo(TINY_REPO, files)
    with LocalHub([repo]) as hub:
        config = demanding(hub, tmp_path, signer)
        assert check_here(MODEL, config, loader=Loader()).outcome is Outcome.GRANTED
        with pytest.raises(ModelLoadError, match=r"tokenizer\.json has other bytes than were"):
            fetch(MODEL, config, repo.sha)


def test_prove_here_takes_a_receipt_for_a_signed_copy_alone(tmp_path, signer, stranger):
    """While the Hub is away the copy here is compared with the signature, without network."""
    repo = Repo(TINY_REPO, signer.signed(single_files()))
    with LocalHub([repo]) as hub:
        config = demanding(
            hub, tmp_path, signer, on_unreachable="allow_cached", timeout_s=1, deadline_s=4
        )
        assert prove_here(MODEL, config).outcome is Outcome.GRANTED
        fetch(MODEL, config, repo.sha)
        hub.stop()
        assert prove_here(MODEL, config).outcome is Outcome.GRANTED
        assert fetch(MODEL, config, repo.sha, offline=True).cache_bytes > 0
        other = config.model_copy(update={"signature": stranger.demanded})
        verdict = prove_here(MODEL, other)
        assert verdict.outcome is Outcome.HUB_UNREACHABLE
        assert "is not signed by the key" in verdict.hub_message


@pytest.mark.parametrize("content", [None, b"no key", "rsa"], ids=["missing", "text", "rsa"])
def test_signed_files_of_a_key_that_is_none_is_undecided(tmp_path, signer, content):
    """It is this node that cannot say; the remedy names the file."""
    key = tmp_path / "key.pem"
    if content == "rsa":
        public = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
        content = public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    if content is not None:
        key.write_bytes(content)
    demanded = SignatureConfig(public_key=str(key))
    with pytest.raises(signatures.Undecided) as raised:
        signatures.signed_files(signer.signed(single_files())["model.sig"], demanded)
    assert str(key) in raised.value.message
    assert "public_key" in raised.value.remedy


def test_signed_files_without_the_library_is_undecided(monkeypatch, signer):
    """On a node whose environment lacks the extra."""
    demanded = signer.demanded
    monkeypatch.setitem(sys.modules, "model_signing._signing", None)
    monkeypatch.delitem(sys.modules, "serve_app.access.bundle", raising=False)
    with pytest.raises(signatures.Undecided, match="is not installed on this node") as raised:
        signatures.signed_files(b"{}", demanded)
    assert "extra `signing`" in raised.value.remedy


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"identity": "a@b.c"},
        {"issuer": "https://i"},
        {"public_key": "k", "identity": "a@b.c", "issuer": "https://i"},
        {"public_key": "k", "trust_file": "t"},
    ],
)
def test_signature_config_names_one_signer(keys):
    """A key, or an identity with its issuer."""
    with pytest.raises(ValidationError, match="either public_key, or identity and issuer"):
        SignatureConfig(**keys)


def test_signature_config_needs_the_extra(monkeypatch):
    """The config error names it."""
    monkeypatch.setattr(access_config, "find_spec", lambda name: None)
    with pytest.raises(ValidationError, match=r"pip install 'serve-app\[signing\]'"):
        SignatureConfig(public_key="k")


def test_signed_files_by_identity_needs_a_root_of_trust(tmp_path, signer):
    """A bundle by a key is none by an identity; without a root of trust nothing is said."""
    content = signer.signed(single_files())["model.sig"]
    keyless = {"identity": "a@example.com", "issuer": "https://issuer.example"}
    broken = tmp_path / "trust.json"
    broken.write_text("{}")
    with pytest.raises(signatures.Undecided, match="root of trust cannot be had") as raised:
        signatures.signed_files(content, SignatureConfig(**keyless, trust_file=str(broken)))
    assert "trust_file" in raised.value.remedy
