"""Every row of evidence on the wire, and the class the real client makes of it."""

from __future__ import annotations

from dataclasses import dataclass

import httpx
import pytest
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
)

from scripts.local_hub import Behaviour, LocalHub, Repo, Route, fingerprint
from tests.conftest import TINY_REPO, tiny_files

SHARD = "model-00001-of-00002.safetensors"
LOG_IN = (
    f"Access to model {TINY_REPO} is restricted. You must have access to it and be "
    "authenticated to access it. Please log in."
)
FINE_GRAINED = (
    "Please enable access to public gated repositories in your fine-grained token settings to "
    "view this repository."
)
ORG_POLICY = (
    "Due to the organization token policy, your token needs to be approved by the organization "
    "before you can access this resource."
)


@dataclass(frozen=True)
class Row:
    """What a token gets on every content route."""

    behaviour: Behaviour
    status: int
    code: str | None
    message: str
    error: type[HfHubHTTPError]  # of auth_check
    download_error: type[Exception]  # of hf_hub_download


ROWS = [
    Row(
        Behaviour.never_asked,
        403,
        "GatedRepo",
        f"Access to model {TINY_REPO} is restricted and you are not in the authorized list. "
        f"Visit https://huggingface.co/{TINY_REPO} to ask for access.",
        GatedRepoError,
        GatedRepoError,
    ),
    Row(
        Behaviour.pending,
        403,
        "GatedRepo",
        f"Your request to access model {TINY_REPO} is awaiting a review from the repo authors.",
        GatedRepoError,
        GatedRepoError,
    ),
    Row(
        Behaviour.rejected,
        403,
        "GatedRepo",
        f"Your request to access model {TINY_REPO} has been rejected by the repo's authors.",
        GatedRepoError,
        GatedRepoError,
    ),
    Row(
        Behaviour.reset,
        403,
        "GatedRepo",
        f"Your request to access model {TINY_REPO} has been reset by the repo's authors. "
        f"Visit https://huggingface.co/{TINY_REPO} to submit a new request.",
        GatedRepoError,
        GatedRepoError,
    ),
    Row(Behaviour.invalid, 401, "GatedRepo", LOG_IN, GatedRepoError, GatedRepoError),
    Row(
        Behaviour.expired,
        401,
        None,
        'User Access Token "alice" is expired',
        HfHubHTTPError,
        HfHubHTTPError,
    ),
    Row(
        Behaviour.fine_grained,
        403,
        None,
        FINE_GRAINED,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    ),
    Row(
        Behaviour.fine_grained_elsewhere,
        403,
        None,
        FINE_GRAINED,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    ),
    Row(
        Behaviour.org_policy_pending,
        403,
        None,
        ORG_POLICY,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    ),
    Row(
        Behaviour.org_policy_denied,
        403,
        None,
        ORG_POLICY,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    ),
    Row(
        Behaviour.org_revoked,
        403,
        None,
        "Your token has been revoked by the organization administrator, you can no longer access "
        "organization resources. Please contact them for more information.",
        HfHubHTTPError,
        LocalEntryNotFoundError,
    ),
    Row(
        Behaviour.disabled,
        403,
        None,
        "Access to this resource is disabled.",
        DisabledRepoError,
        LocalEntryNotFoundError,
    ),
    Row(
        Behaviour.country_blocked,
        403,
        None,
        "This model is not available from your location.",
        HfHubHTTPError,
        LocalEntryNotFoundError,
    ),
]
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.behaviour.value)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


@by_row
@pytest.mark.parametrize("path", [SHARD, "config.json", "no/such/file.bin"])
def test_refusal_of_a_file(hub: LocalHub, row: Row, path: str):
    """A file is refused with the Hub's status, code and words as text, existing or not."""
    url = f"{hub.url}/{TINY_REPO}/resolve/main/{path}"
    answer = httpx.get(url, headers=bearer(hub.issue_token(row.behaviour)))
    assert (answer.status_code, answer.headers.get("x-error-code")) == (row.status, row.code)
    assert answer.headers["x-error-message"] == answer.text == row.message
    assert answer.headers["content-type"].startswith("text/plain")
    assert ("www-authenticate" in answer.headers) == (row.status == 401)
    assert answer.headers["x-request-id"].startswith("Root=1-")


@by_row
def test_refusal_of_the_api(hub: LocalHub, row: Row):
    """auth-check is refused with the same words in JSON, and a HEAD with the same headers."""
    token = hub.issue_token(row.behaviour)
    url = f"{hub.url}/api/models/{TINY_REPO}/auth-check"
    answer = httpx.get(url, headers=bearer(token))
    assert answer.status_code == row.status
    assert answer.json() == {"error": row.message}
    url = f"{hub.url}/{TINY_REPO}/resolve/main/{SHARD}"
    head = httpx.head(url, headers=bearer(token))
    assert (head.status_code, head.content) == (row.status, b"")
    assert head.headers["x-error-message"] == answer.json()["error"]


@by_row
def test_refusal_as_the_client_sees_it(hub: LocalHub, row: Row, tmp_path):
    """huggingface_hub raises the class that it raises for the real Hub."""
    token = hub.issue_token(row.behaviour)
    with pytest.raises(HfHubHTTPError) as refused:
        HfApi(endpoint=hub.url, token=token).auth_check(TINY_REPO)
    assert type(refused.value) is row.error
    with pytest.raises(row.download_error) as failed:
        hf_hub_download(TINY_REPO, SHARD, token=token, endpoint=hub.url, cache_dir=tmp_path)
    assert type(failed.value) is row.download_error
    if row.download_error is LocalEntryNotFoundError:
        assert "check your connection" in str(failed.value)


@by_row
def test_refused_callers_see_masked_hashes(hub: LocalHub, row: Row):
    """Who may not read gets 64 asterisks for the hash of a large file, or a 401 if dead."""
    url = f"{hub.url}/api/models/{TINY_REPO}/tree/main"
    answer = httpx.get(url, headers=bearer(hub.issue_token(row.behaviour)))
    if row.behaviour in {Behaviour.invalid, Behaviour.expired}:
        assert answer.status_code == 401
        assert "x-error-code" not in answer.headers
    else:
        assert {f["lfs"]["oid"] for f in answer.json() if "lfs" in f} == {"*" * 64}


@by_row
def test_open_files(hub: LocalHub, row: Row):
    """README and licence at the root are open to everybody but a dead token."""
    headers = bearer(hub.issue_token(row.behaviour))
    dead = row.behaviour in {Behaviour.invalid, Behaviour.expired}
    for name in ("README.md", "LICENSE.txt"):
        answer = httpx.get(f"{hub.url}/{TINY_REPO}/resolve/main/{name}", headers=headers)
        assert answer.status_code == (401 if dead else 200)
    assert httpx.get(f"{hub.url}/{TINY_REPO}/resolve/main/README.md").text == "# tiny\n"


def test_no_token(hub: LocalHub):
    """Without a token a gated file is 401 GatedRepo, as with an unknown one to the byte."""
    url = f"{hub.url}/{TINY_REPO}/resolve/main/config.json"
    bare, unknown = httpx.get(url), httpx.get(url, headers=bearer("hf_" + "x" * 34))
    assert (bare.status_code, bare.headers["x-error-code"]) == (401, "GatedRepo")
    assert bare.text == LOG_IN
    assert bare.headers["www-authenticate"] == (
        'Bearer realm="Authentication required", charset="UTF-8"'
    )
    volatile = {"x-request-id", "date", "ratelimit"}
    first, second = (
        {name: value for name, value in answer.headers.items() if name not in volatile}
        for answer in (bare, unknown)
    )
    assert (first, bare.content) == (second, unknown.content)


def test_granted(hub: LocalHub):
    """A granted token passes auth-check, reads files and sees the hashes."""
    token = hub.issue_token()
    api = HfApi(endpoint=hub.url, token=token)
    api.auth_check(TINY_REPO)
    hashes = {f.lfs.sha256 for f in api.list_repo_tree(TINY_REPO) if f.lfs}
    assert len(hashes) == 2
    assert not any("*" in value for value in hashes)
    with pytest.raises(HfHubHTTPError, match="not the required permissions"):
        api.auth_check(TINY_REPO, write=True)


@pytest.mark.parametrize("behaviour", [Behaviour.invalid, Behaviour.expired])
def test_dead_token_breaks_public_repositories(behaviour: Behaviour):
    """A dead token is a bare 401 even where no token is needed."""
    with LocalHub([Repo("acme/open", {"config.json": b"{}"}, gated=False)]) as hub:
        token = hub.issue_token(behaviour)
        for path in ("/acme/open/resolve/main/config.json", "/api/models/acme/open"):
            answer = httpx.get(hub.url + path, headers=bearer(token))
            assert answer.status_code == 401
            assert "x-error-code" not in answer.headers
            assert httpx.get(hub.url + path, follow_redirects=True).status_code == 200


@pytest.mark.parametrize(
    ("behaviour", "status", "message"),
    [
        (Behaviour.granted, 200, None),
        (Behaviour.pending, 200, None),
        (Behaviour.invalid, 401, "Invalid username or password."),
        (Behaviour.expired, 401, 'User Access Token "bob" is expired'),
    ],
)
def test_whoami(hub: LocalHub, behaviour: Behaviour, status: int, message: str | None):
    """Whoami returns the account of a live token, whatever its grants, not of a dead one."""
    token = hub.issue_token(behaviour, account="bob")
    answer = httpx.get(f"{hub.url}/api/whoami-v2", headers=bearer(token))
    assert answer.status_code == status
    assert answer.json().get("error") == message
    assert answer.json().get("name") == (None if message else "bob")


@pytest.mark.parametrize("behaviour", [Behaviour.fine_grained, Behaviour.fine_grained_elsewhere])
def test_whoami_of_a_fine_grained_token(hub: LocalHub, behaviour: Behaviour):
    """Whoami returns the role of a fine-grained token and what it is scoped to."""
    token = hub.issue_token(behaviour)
    access = HfApi(endpoint=hub.url).whoami(token)["auth"]["accessToken"]
    assert access["role"] == "fineGrained"
    assert access["fineGrained"]["canReadGatedRepos"] is False
    scoped = [scope["entity"]["name"] for scope in access["fineGrained"]["scoped"]]
    elsewhere = behaviour is Behaviour.fine_grained_elsewhere
    assert scoped == (["alice/elsewhere"] if elsewhere else [])


def test_auth_ok_but_files_denied(hub: LocalHub):
    """A token can pass auth-check and be refused on every file."""
    token = hub.issue_token(Behaviour.auth_ok_files_denied)
    HfApi(endpoint=hub.url, token=token).auth_check(TINY_REPO)
    answer = httpx.head(f"{hub.url}/{TINY_REPO}/resolve/main/{SHARD}", headers=bearer(token))
    assert answer.status_code == 403
    assert "x-error-code" not in answer.headers


def test_disabled_is_reported_by_the_metadata(hub: LocalHub):
    """Metadata of a disabled repository stays public and says so."""
    token = hub.issue_token(Behaviour.disabled)
    assert HfApi(endpoint=hub.url, token=token).model_info(TINY_REPO).disabled is True


def test_rate_limit(hub: LocalHub):
    """A rate-limited answer says when to come back, in the way the client reads it."""
    token = hub.issue_token(Behaviour.rate_limited, retry_after_s=7)
    with pytest.raises(HfHubHTTPError, match="Retry after 7 seconds") as limited:
        HfApi(endpoint=hub.url, token=token).model_info(TINY_REPO)
    headers = limited.value.response.headers
    assert limited.value.response.status_code == 429
    assert headers["retry-after"] == "7"
    assert headers["ratelimit"] == '"api";r=0;t=7'
    assert headers["ratelimit-policy"] == '"fixed window";"api";q=1000;w=300'


def test_quota_is_in_every_answer(hub: LocalHub):
    """The quota counts down per caller and kind, on refusals as well."""
    token = hub.issue_token(Behaviour.pending)
    url = f"{hub.url}/{TINY_REPO}/resolve/main/config.json"
    left = [httpx.head(url, headers=bearer(token)).headers["ratelimit"] for _ in range(2)]
    assert left == ['"resolvers";r=4999;t=300', '"resolvers";r=4998;t=300']


def test_server_error_and_garbage(hub: LocalHub):
    """A sick Hub answers an HTML page with 503; a captive portal does it with 200."""
    url = f"{hub.url}/api/models/{TINY_REPO}"
    sick = httpx.get(url, headers=bearer(hub.issue_token(Behaviour.server_error)))
    portal = httpx.get(url, headers=bearer(hub.issue_token(Behaviour.garbage)))
    assert (sick.status_code, portal.status_code) == (503, 200)
    assert {sick.headers["content-type"], portal.headers["content-type"]} == {
        "text/html; charset=utf-8"
    }


def test_not_http(hub: LocalHub):
    """What is no HTTP is a protocol error for the client."""
    token = hub.issue_token(Behaviour.not_http)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(f"{hub.url}/api/whoami-v2", headers=bearer(token))


def test_hang(hub: LocalHub):
    """A hanging Hub takes the request, logs it and never answers."""
    token = hub.issue_token(Behaviour.hang)
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{hub.url}/api/whoami-v2", headers=bearer(token), timeout=0.1)
    assert [(entry.route, entry.status) for entry in hub.log] == [(Route.whoami, 0)]


@pytest.mark.parametrize("status", [429, 503])
def test_flaky(hub: LocalHub, status: int):
    """A flaky Hub fails as often as it was set to and is well afterwards."""
    token = hub.issue_token(Behaviour.flaky, failures=2, failure_status=status)
    url = f"{hub.url}/api/models/{TINY_REPO}/auth-check"
    got = [httpx.get(url, headers=bearer(token)).status_code for _ in range(3)]
    assert got == [status, status, 200]
    hub.set_behaviour(token, Behaviour.flaky, failures=1)
    got = [httpx.get(url, headers=bearer(token)).status_code for _ in range(2)]
    assert got == [status, 200]


def test_flaky_hub_is_retried_by_the_real_client(hub: LocalHub):
    """huggingface_hub gets over a 503 on the routes that it retries."""
    token = hub.issue_token(Behaviour.flaky, failures=1)
    names = [entry.path for entry in HfApi(endpoint=hub.url, token=token).list_repo_tree(TINY_REPO)]
    assert SHARD in names
    assert [entry.status for entry in hub.log] == [503, 200]


def test_fault_limited_to_a_route(hub: LocalHub):
    """Elsewhere the token is granted."""
    token = hub.issue_token(Behaviour.server_error, on=[Route.whoami])
    api = HfApi(endpoint=hub.url, token=token)
    api.auth_check(TINY_REPO)
    with pytest.raises(HfHubHTTPError):
        api.whoami()


def test_behaviour_toward_one_repository(hub: LocalHub):
    """A token can be granted on one repository and refused on another."""
    hub.add_repo(Repo("acme/adapter", tiny_files()))
    token = hub.issue_token()
    hub.set_behaviour(token, Behaviour.pending, repo_id="acme/adapter")
    api = HfApi(endpoint=hub.url, token=token)
    api.auth_check(TINY_REPO)
    with pytest.raises(GatedRepoError, match="awaiting a review"):
        api.auth_check("acme/adapter")


def test_behaviour_switched_at_run_time(hub: LocalHub):
    """A grant and its withdrawal show at once."""
    token = hub.issue_token(Behaviour.pending)
    url = f"{hub.url}/api/models/{TINY_REPO}/auth-check"
    got = []
    for behaviour in (Behaviour.pending, Behaviour.granted, Behaviour.reset):
        hub.set_behaviour(token, behaviour)
        got.append(httpx.get(url, headers=bearer(token)).status_code)
    assert got == [403, 200, 403]


def test_outage_strikes_everybody(hub: LocalHub):
    """An outage needs no token and ends when it is set to."""
    url = f"{hub.url}/api/models/{TINY_REPO}"
    hub.set_outage(Behaviour.server_error)
    assert httpx.get(url).status_code == 503
    hub.set_outage(None)
    assert httpx.get(url).status_code == 200
    hub.set_behaviour(None, Behaviour.server_error)
    assert httpx.get(url).status_code == 503
    assert httpx.get(url, headers=bearer(hub.issue_token())).status_code == 200


def test_log_names_tokens_by_fingerprint(hub: LocalHub):
    """The log holds no token, also where an unknown token is named in an error."""
    token = hub.issue_token()
    httpx.get(f"{hub.url}/api/whoami-v2", headers=bearer(token))
    assert [entry.token for entry in hub.log] == [fingerprint(token)]
    assert token not in repr(hub.log)
    unknown = "hf_" + "u" * 34
    with pytest.raises(KeyError) as missing:
        hub.set_behaviour(unknown, Behaviour.granted)
    assert unknown not in str(missing.value)
