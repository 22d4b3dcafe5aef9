"""The license policy: what a card states, what a text's hash is, and who is refused."""

import hashlib

import pytest
from huggingface_hub import constants

from scripts.local_hub import Behaviour, LocalHub, Repo
from serve_app.access import license as licenses
from serve_app.access.hub.probe import check_here
from serve_app.access.node_check import prove_here
from serve_app.access.verdict import CommitFacts, Outcome
from serve_app.access_config import LicensePolicy
from serve_app.checkpoint.runnable import Loader
from serve_app.config import AccessConfig, ModelConfig, parse_args
from serve_app.errors import ConfigError
from serve_app.weights.fetch import fetch
from tests.access.cases import MODEL, access, sharded_files, single_files
from tests.conftest import TINY_REPO, safetensors

TEXT = b"LLAMA 3.2 COMMUNITY LICENSE AGREEMENT\n"
HASH = hashlib.sha256(TEXT).hexdigest()
LOADER = Loader(dtype="bfloat16", num_gpus=0)


def card(*lines):
    return "\n".join(["---", *lines, "---", "# tiny", ""]).encode()


def files(*lines, text=TEXT, base=sharded_files):
    found = base() | {"README.md": card(*lines)}
    return found if text is None else found | {"LICENSE.txt": text}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))


def policy(allow=None, text=None):
    return LicensePolicy(allow=allow, text_sha256=text)


def ask(tmp_path, content, terms, **options):
    """Return the verdict about a repository of these files, and the log of its Hub."""
    with LocalHub([Repo(TINY_REPO, content, xet=options.pop("xet", False))]) as hub:
        token = hub.issue_token(options.pop("behaviour", Behaviour.granted))
        config = access(hub, tmp_path, token).model_copy(update={"license": terms})
        return check_here(MODEL, config, **options), hub.log


@pytest.mark.parametrize(
    ("stated", "tags", "found"),
    [
        ({"license": "Apache-2.0"}, [], "apache-2.0"),
        ({"license": "other", "license_name": "Nice-One"}, [], "nice-one"),
        ({"license": "other"}, [], "other"),
        ({"license": "mit", "license_name": "nice-one"}, [], "mit"),
        ({"license": ["mit", "apache-2.0"]}, [], "mit, apache-2.0"),
        ({}, ["transformers", "license:gemma"], "gemma"),
        (None, ["license:gemma", 3, None], "gemma"),
        ({"license": 7}, [], None),
        ({"license": ""}, [], None),
        ([], None, None),
        (None, (), None),
    ],
)
def test_stated_license_of_a_card(stated, tags, found):
    """The card first, then the tags; whatever else stands there is no license."""
    assert licenses.stated_license(stated, tags) == found


@pytest.mark.parametrize(
    ("terms", "facts", "words"),
    [
        (None, CommitFacts(), None),
        (policy(), CommitFacts("gemma"), None),
        (policy(), CommitFacts(), "states no license; one must be stated"),
        (policy(["gemma"]), CommitFacts("gemma"), None),
        (policy(["mit", "Apache-2.0"]), CommitFacts("apache-2.0"), None),
        (policy(["mit"]), CommitFacts("gemma"), "states the license gemma; allowed are mit"),
        (policy(["mit"]), CommitFacts("mit, gemma"), "states the license mit, gemma"),
        (policy(["mit"]), CommitFacts(), "states no license; allowed are mit"),
        (policy(text=[HASH]), CommitFacts(None, HASH), None),
        (policy(text=["sha256:" + HASH.upper()]), CommitFacts("x", HASH), None),
        (
            policy(text=[HASH]),
            CommitFacts("x", "0" * 64),
            f"SHA-256 {'0' * 64}; accepted is {HASH}",
        ),
        (policy(text=[HASH]), CommitFacts("x"), "has no license text"),
        (policy(["mit"], [HASH]), CommitFacts("gemma", HASH), "allowed are mit"),
        (policy(["mit"], [HASH]), CommitFacts("mit", "0" * 64), "accepted is"),
    ],
)
def test_license_fault_of_a_policy(terms, facts, words):
    """One sentence of what was found and what is allowed; no license known is not allowed."""
    fault = licenses.license_fault(terms, facts)
    assert words in fault if words else fault is None


@pytest.mark.parametrize("terms", [policy(["llama3.2"]), policy(text=[HASH]), policy()])
@pytest.mark.parametrize("xet", [False, True], ids=["plain", "xet"])
@pytest.mark.parametrize("base", [single_files, sharded_files])
def test_license_allowed_is_granted_in_five_requests(tmp_path, terms, xet, base):
    """With the check of config.json and of the license's text; the facts stand in the verdict."""
    content = files("license: llama3.2", base=base)
    verdict, log = ask(tmp_path, content, terms, xet=xet, loader=LOADER)
    assert verdict.outcome is Outcome.GRANTED
    assert verdict.hub_requests == sum(entry.origin == "hub" for entry in log) <= 5
    assert verdict.facts.license_id == "llama3.2"
    assert verdict.facts.license_sha256 == (HASH if terms.text_sha256 else None)


@pytest.mark.parametrize(
    ("content", "terms", "words"),
    [
        (files("license: gemma"), policy(["llama3.2"]), "license gemma; allowed are llama3.2"),
        (files(), policy(["llama3.2"]), "states no license"),
        (files("license: llama3.2", text=b"New terms\n"), policy(text=[HASH]), "accepted is"),
        (files("license: llama3.2", text=None), policy(text=[HASH]), "no license text"),
    ],
)
def test_license_refused_before_any_byte_of_weights(tmp_path, content, terms, words):
    """Neither config.json nor the weights are asked for."""
    verdict, log = ask(tmp_path, content, terms, loader=LOADER)
    assert verdict.outcome is Outcome.LICENSE_NOT_ALLOWED
    assert words in verdict.hub_message
    assert "access.license" in verdict.remedy
    assert verdict.commit is not None
    assert verdict.hub_requests <= 2
    assert not any("safetensors" in entry.path or "config" in entry.path for entry in log)


def test_license_of_the_first_node_counts_for_the_others(tmp_path):
    """It is the commit's; a node with a stricter policy refuses by the same facts."""
    with LocalHub([Repo(TINY_REPO, files("license: llama3.2"))]) as hub:
        terms = policy(["llama3.2"], [HASH])
        config = access(hub, tmp_path, hub.issue_token()).model_copy(update={"license": terms})
        first = check_here(MODEL, config)
        second = check_here(MODEL, config, commit=first.commit, hint=first)
        assert (second.outcome, second.facts) == (Outcome.GRANTED, first.facts)
        assert second.hub_requests == 1
        strict = config.model_copy(update={"license": policy(["mit"])})
        third = check_here(MODEL, strict, commit=first.commit, hint=first)
        assert third.outcome is Outcome.LICENSE_NOT_ALLOWED


def test_license_is_asked_by_a_replica_itself(tmp_path):
    """Pinned, without another node's verdict: the policy holds on scale-up and while serving."""
    content = files("license: gemma")
    commit = Repo(TINY_REPO, content).sha
    verdict, _ = ask(tmp_path, content, policy(["llama3.2"]), commit=commit)
    assert verdict.outcome is Outcome.LICENSE_NOT_ALLOWED


def test_license_index_needed_for_numbered_shards_that_are_not_all_there(tmp_path):
    """A complete set stands for the index; another one is compared with it."""
    third = {"model-00003-of-00003.safetensors": safetensors({"w": [8]})}
    content = files("license: llama3.2") | third
    verdict, log = ask(tmp_path, content, policy(text=[HASH]))
    assert verdict.outcome is Outcome.GRANTED
    assert any(entry.path.endswith("index.json") for entry in log)


def test_license_allowed_leaves_a_refusal_of_the_hub_the_hubs(tmp_path):
    """A license that is allowed is not yet accepted."""
    content = files("license: llama3.2")
    never = Behaviour.never_asked
    verdict, _ = ask(tmp_path, content, policy(["llama3.2"], [HASH]), behaviour=never)
    assert verdict.outcome is Outcome.LICENSE_NOT_ACCEPTED


@pytest.mark.parametrize("terms", [None, policy(["mit"]), policy(text=[HASH])])
def test_license_of_a_directory_by_its_card_and_text(tmp_path, terms):
    """The front matter of README.md and LICENSE*, as the Hub lists them."""
    for name, content in files("license: other", "license_name: MIT").items():
        (tmp_path / name).write_bytes(content)
    model = ModelConfig(path=str(tmp_path))
    verdict = check_here(model, AccessConfig(license=terms))
    assert verdict.outcome is Outcome.GRANTED
    assert (verdict.facts.license_id, verdict.facts.license_sha256) == ("mit", HASH)
    refused = check_here(model, AccessConfig(license=policy(["gemma"])))
    assert refused.outcome is Outcome.LICENSE_NOT_ALLOWED
    assert "states the license mit; allowed are gemma" in refused.hub_message


@pytest.mark.parametrize(
    "text", [b"", b"# no card", b"---\nlicense: [", b"---\n- 1\n---", b"---\n\xff: !!x\n---\n"]
)
def test_license_of_a_card_that_cannot_be_read_is_none(tmp_path, text):
    """So it is not allowed where a policy asks."""
    for name, content in (files() | {"README.md": text}).items():
        (tmp_path / name).write_bytes(content)
    verdict = check_here(ModelConfig(path=str(tmp_path)), AccessConfig(license=policy(["mit"])))
    assert verdict.outcome is Outcome.LICENSE_NOT_ALLOWED


def test_license_of_a_receipt_stands_in_only_if_allowed(tmp_path):
    """While the Hub is away the license is the receipt's, and the text the copy's."""
    with LocalHub([Repo(TINY_REPO, files("license: gemma"))]) as hub:
        token = hub.issue_token()
        limits = {"on_unreachable": "allow_cached", "timeout_s": 0.5, "deadline_s": 2}
        config = access(hub, tmp_path, token, **limits)
        first = prove_here(MODEL, config)
        fetch(MODEL, config, first.commit)
        hub.stop()
        for terms, outcome in [
            (policy(["gemma"]), Outcome.GRANTED),
            (policy(text=[HASH]), Outcome.GRANTED),
            (policy(["mit"]), Outcome.HUB_UNREACHABLE),
            (policy(text=["0" * 64]), Outcome.HUB_UNREACHABLE),
        ]:
            update = {"license": terms}
            assert prove_here(MODEL, config.model_copy(update=update)).outcome is outcome
        hub.start()


@pytest.mark.parametrize(
    "wrong", [{"allow": []}, {"allow": [" "]}, {"text_sha256": ["12"]}, {"alow": ["mit"]}]
)
def test_license_policy_that_is_wrong(wrong):
    """An empty list would allow nothing, a short hash nothing either."""
    with pytest.raises(ConfigError, match=r"args\.access\.license"):
        parse_args({"model": {"repo_id": TINY_REPO}, "access": {"license": wrong}})
