"""What an answer means: every recorded or quoted one, and anything else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.access.hub.classify import STORAGE, Answer, Caller, Step, classify, holds_weights
from serve_app.access.verdict import Outcome
from tests.conftest import safetensors

KNOWN, NOBODY = Caller(has_token=True), Caller(has_token=False)
ID = "acme/tiny"
WEIGHTS = safetensors({"weight": [64, 8]})
SIZE = len(WEIGHTS)


def refusal(status, code=None, message=None, *, step=Step.WEIGHTS, body=b""):
    headers = {"x-error-code": code, "x-error-message": message}
    return Answer(step, status, {key: value for key, value in headers.items() if value}, body)


# status, X-Error-Code, X-Error-Message (or None: the body's words), has a token -> outcome
RECORDED = [
    (401, "GatedRepo", f"Access to model {ID} is restricted. You must have access to it and be "
     "authenticated to access it. Please log in.", False, Outcome.NO_TOKEN),
    (401, "GatedRepo", f"Access to model {ID} is restricted. You must have access to it and be "
     "authenticated to access it. Please log in.", True, Outcome.INVALID_TOKEN),
    (403, "GatedRepo", f"Access to model {ID} is restricted and you are not in the authorized "
     f"list. Visit https://huggingface.co/{ID} to ask for access.", True,
     Outcome.LICENSE_NOT_ACCEPTED),
    (403, "GatedRepo", f"Your request to access model {ID} is awaiting a review from the repo "
     "authors.", True, Outcome.REQUEST_PENDING),
    (403, "GatedRepo", f"Your request to access model {ID} has been rejected by the repo's "
     "authors.", True, Outcome.REQUEST_REJECTED),
    (403, "GatedRepo", f"Your request to access model {ID} has been reset by the repo's authors. "
     f"Visit https://huggingface.co/{ID} to submit a new request.", True, Outcome.REQUEST_RESET),
    (403, "GatedRepo", "words that nobody has seen", True, Outcome.LICENSE_NOT_ACCEPTED),
    (403, None, "Please enable access to public gated repositories in your fine-grained token "
     "settings to view this repository.", True, Outcome.TOKEN_SCOPE),
    (403, None, "Due to the organization token policy, your token needs to be approved by the "
     "organization before you can access this resource.", True, Outcome.ORG_POLICY),
    (403, None, "Your token has been revoked by the organization administrator, you can no longer "
     "access organization resources. Please contact them for more information.", True,
     Outcome.ORG_POLICY),
    (403, None, "Access to this resource is disabled.", True, Outcome.REPO_DISABLED),
    (403, None, "This model is not available from your country.", True, Outcome.CONTENT_BLOCKED),
    (403, None, None, True, Outcome.CONTENT_BLOCKED),
    (451, None, "Unavailable for legal reasons", True, Outcome.CONTENT_BLOCKED),
    (401, None, "Invalid username or password.", True, Outcome.INVALID_TOKEN),
    (401, None, "Invalid credentials in Authorization header", True, Outcome.INVALID_TOKEN),
    (401, None, 'User Access Token "x" is expired', True, Outcome.EXPIRED_TOKEN),
    (404, "RepoNotFound", "Repository not found", True, Outcome.REPO_NOT_FOUND),
    (404, "RevisionNotFound", "Invalid rev id: x", True, Outcome.REVISION_NOT_FOUND),
    (404, "EntryNotFound", "Entry not found", True, Outcome.WEIGHTS_MISSING),
    (404, None, None, True, Outcome.UNKNOWN),
    (429, None, "We had to rate limit your IP", True, Outcome.RATE_LIMITED),
    (500, None, None, True, Outcome.HUB_UNREACHABLE),
    (502, None, None, False, Outcome.HUB_UNREACHABLE),
    (599, "GatedRepo", None, True, Outcome.HUB_UNREACHABLE),
    (407, None, None, True, Outcome.HUB_UNREACHABLE),
    (302, None, None, True, Outcome.UNKNOWN),
    (400, None, None, True, Outcome.UNKNOWN),
]  # fmt: skip


@pytest.mark.parametrize(("status", "code", "message", "has_token", "outcome"), RECORDED)
def test_classify_answers_of_the_real_hub(status, code, message, has_token, outcome):
    """The code decides, then the exact words, then the status."""
    assert classify(refusal(status, code, message), Caller(has_token=has_token)) is outcome


def test_classify_finds_words_in_the_body_too():
    """`/api` answers carry them as JSON, a proxy's page as HTML."""
    said = "Due to the organization token policy, no."
    body = json.dumps({"error": said}).encode()
    assert classify(refusal(403, body=body), KNOWN) is Outcome.ORG_POLICY
    page = b"<html><style>p{}</style><h1>Blocked</h1> by <b>Acme</b> Security</html>"
    answer = refusal(403, body=page)
    assert classify(answer, KNOWN) is Outcome.CONTENT_BLOCKED
    assert answer.words == "Blocked by Acme Security"


def test_classify_bare_401_without_a_token_depends_on_the_question():
    """A repository nobody may see, at its description; a missing token, at its content."""
    answer = "Invalid username or password."
    description = refusal(401, None, answer, step=Step.DESCRIPTION)
    assert classify(description, NOBODY) is Outcome.REPO_NOT_FOUND
    assert classify(refusal(401, None, answer), NOBODY) is Outcome.NO_TOKEN


@pytest.mark.parametrize("step", sorted(STORAGE))
@pytest.mark.parametrize("status", [200, 302, 401, 403, 404, 416, 500, 503])
def test_classify_answers_of_the_storage_as_the_storages(step, status):
    """The Hub has said yes by then; a 403 there is no license question."""
    assert classify(refusal(status, "GatedRepo", step=step), KNOWN) is Outcome.WEIGHTS_UNREACHABLE


def test_classify_page_instead_of_json_is_not_the_hub():
    """A captive portal answers 200 to everything."""
    assert classify(refusal(200, body=b"<html>Sign in</html>"), KNOWN) is Outcome.HUB_UNREACHABLE


text = st.text(max_size=60)
codes = st.sampled_from(["GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound"]) | text
messages = st.sampled_from([row[2] for row in RECORDED if row[2]]) | text
answers = st.builds(
    Answer,
    st.sampled_from(list(Step)),
    st.integers(100, 599),
    st.fixed_dictionaries({}, optional={"x-error-code": codes, "x-error-message": messages})
    | st.dictionaries(text, text, max_size=3),
    st.binary(max_size=80) | messages.map(lambda said: json.dumps({"error": said}).encode()),
)


@given(answers, st.booleans())
def test_classify_gives_any_answer_one_meaning_and_none_is_a_yes(answer, has_token):
    """No status, header or body makes a refusal table say granted, or raise."""
    outcome = classify(answer, Caller(has_token=has_token))
    assert isinstance(outcome, Outcome)
    assert outcome is not Outcome.GRANTED
    assert answer.words.isprintable()


def part(body, *, total=SIZE, status=206):
    headers = {"content-range": f"bytes 0-8/{total}"} if status == 206 else {}
    return Answer(Step.BYTES, status, headers, body)


@pytest.mark.parametrize(
    ("answer", "size", "holds"),
    [
        (part(WEIGHTS[:9]), SIZE, True),
        (part(WEIGHTS[:9]), None, True),
        (part(WEIGHTS[:9], status=200), SIZE, True),
        (part(WEIGHTS[:9]), SIZE + 1, False),
        (part(WEIGHTS[:8]), SIZE, False),
        (part(WEIGHTS[:9], total=20), None, False),
        (part(b"<!doctype html>"), None, False),
        (part(b"\0" * 8 + b"{"), None, False),
        (part(b"\xff" * 8 + b"{"), None, False),
        (part(WEIGHTS[:9], status=403), SIZE, False),
        (part(b""), None, False),
    ],
)
def test_holds_weights_only_at_the_beginning_of_a_safetensors_file(answer, size, holds):
    """Length, opening brace and size have to fit; a login page has none of them."""
    assert holds_weights(answer, size) is holds


@given(st.binary(max_size=40), st.integers(100, 599), st.none() | st.integers(0, 1 << 40))
def test_holds_weights_is_false_for_other_bytes(body, status, size):
    """Whatever comes: a yes means a plausible header at a success status."""
    answer = part(body, status=status)
    if holds_weights(answer, size):
        assert status in (200, 206)
        assert body[8:9] == b"{"
        assert 2 <= int.from_bytes(body[:8], "little") <= 100_000_000
