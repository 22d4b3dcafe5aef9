"""`serve-app check` of a model in an object store: S3 as moto plays it, and an emulator of GCS."""

import json
import os

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from werkzeug.wrappers import Response

from serve_app.access.digest import directory_digest
from serve_app.access.hub.probe import check_here
from serve_app.cli.main import main
from serve_app.config import AccessConfig, ModelConfig, parse_args
from serve_app.errors import ConfigError
from tests.access.cases import sharded_files, single_files
from tests.ports import free_port
from tests.signing import Signer, write_files
from tests.stores import (
    GCS_URL,
    READ,
    URL,
    etag,
    gcs_refusal,
    local_gcs,
    local_s3,
    refusal,
    served,
)

SHARD = "model-00002-of-00002.safetensors"
PAGE = "<html><body><h1>It works!</h1></body></html>"


@pytest.fixture(scope="module")
def s3_server():
    with local_s3() as running:
        running.put(sharded_files())
        yield running


@pytest.fixture
def s3(alone, s3_server, monkeypatch):
    """The store with a whole model, and a node that may read it."""
    node(monkeypatch, s3_server.user(*READ))
    yield s3_server
    s3_server.before = lambda _request: None
    s3_server.expired.clear()


@pytest.fixture
def gcs(alone):
    with local_gcs() as running:
        running.put(sharded_files())
        yield running


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No cluster, no cloud, and nothing of whoever runs the tests."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "CLOUDSDK_CONFIG"):
        monkeypatch.setenv(name, str(tmp_path / "none"))


def node(monkeypatch, credentials):
    """Let this process have these credentials, and no others."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in credentials.items():
        monkeypatch.setenv(name, value)


def check(tmp_path, capsys, endpoint, *, access=None, **model):
    """Return exit code, what a person is told as one line, and what a script is."""
    args = {
        "model": {"url": URL, **model},
        "access": {"endpoint": endpoint, "timeout_s": 2, "deadline_s": 9, **(access or {})},
        "replica": {"num_gpus": 0},
    }
    app = {"name": "llm", "import_path": "serve_app.app:build_app", "args": args}
    config = tmp_path / "app.yaml"
    config.write_text(yaml.safe_dump({"applications": [app]}))
    code = main(["check", str(config), "--this-node", "--json"])
    found = json.loads(capsys.readouterr().out)
    (row,) = found["nodes"]
    said = f"{row['token']['source']} {row['hub_message'] or ''} {row['remedy']}"
    return code, said, found


def outcome(found):
    return found["nodes"][0]["outcome"]


def test_check_s3_granted(s3, tmp_path, capsys):
    """The listing's digest stands where a commit does; source and fingerprint are shown."""
    code, table, found = check(tmp_path, capsys, s3.url)
    assert (code, outcome(found)) == (0, "granted")
    main(["check", str(tmp_path / "app.yaml"), "--this-node"])
    table = capsys.readouterr().out
    assert "can be read on 1 node" in table
    assert f"listing {found['commit'][:12]}" in table
    token = found["nodes"][0]["token"]
    assert token["source"] == "s3:env"
    assert len(token["fingerprint"]) == 8
    first_bytes = [what for what, _ in s3.seen if SHARD.replace("2-of", "1-of") in what]
    assert first_bytes, "no byte of the weights was asked for"


def test_check_s3_of_the_other_nodes(s3):
    """They take what the first one learned of the listing, and prove by two requests."""
    model, access = ModelConfig(url=URL), AccessConfig(endpoint=s3.url)
    first = check_here(model, access)
    other = check_here(model, access, commit=first.commit, hint=first)
    assert (other.outcome, other.commit, other.hub_requests) == ("granted", first.commit, 2)
    s3.before = whole_file
    refused = check_here(model, access, commit=first.commit, hint=first)
    assert refused.outcome == "weights_unreachable"


@pytest.mark.parametrize(
    ("rights", "words"),
    [(READ[:1], "AccessDenied to GetObject"), (READ[1:], "AccessDenied to ListObjectsV2")],
    ids=["no-read", "no-list"],
)
def test_check_s3_without_a_right(s3, monkeypatch, tmp_path, capsys, rights, words):
    """Who may only list cannot load, and who may only read proves no listing."""
    node(monkeypatch, s3.user(*rights))
    code, table, found = check(tmp_path, capsys, s3.url)
    assert (code, outcome(found)) == (3, "token_scope")
    assert words in table
    assert "s3:GetObject on its objects" in table


def unknown(user):
    return {**user, "AWS_ACCESS_KEY_ID": "AKIA0000000000000000"}


def mistyped(user):
    return {**user, "AWS_SECRET_ACCESS_KEY": "x" * 40}


def halved(user):
    return {"AWS_ACCESS_KEY_ID": user["AWS_ACCESS_KEY_ID"]}


def none(user):
    return {}


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (unknown, ("invalid_token", "InvalidAccessKeyId")),
        (mistyped, ("invalid_token", "SignatureDoesNotMatch")),
        (halved, ("malformed_token", "missing: AWS_SECRET_ACCESS_KEY")),
        (none, ("no_token", "Give this node credentials")),
    ],
)
def test_check_s3_credentials(s3, monkeypatch, tmp_path, capsys, change, row):
    """Each fault by its name, and no key's value anywhere."""
    user = s3.user(*READ)
    node(monkeypatch, change(user))
    code, table, found = check(tmp_path, capsys, s3.url)
    assert (code, outcome(found)) == (3, row[0])
    assert row[1] in table
    for value in user.values():
        assert value not in table + json.dumps(found)


def test_check_s3_session_that_has_ended(s3, monkeypatch, tmp_path, capsys):
    """Temporary credentials end; what the store says and what to do stand together."""
    user = s3.user(*READ)
    node(monkeypatch, {**user, "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEXAMPLE"})
    s3.expired.add(user["AWS_ACCESS_KEY_ID"])
    code, table, found = check(tmp_path, capsys, s3.url)
    assert (code, outcome(found)) == (3, "expired_token")
    assert "400 ExpiredToken" in table
    assert "log in again" in table


def test_check_s3_names_where_the_credentials_come_from(s3, monkeypatch, tmp_path, capsys):
    """A shared file, and a container's role, as botocore's chain finds them."""
    user = s3.user(*READ)
    node(monkeypatch, {})
    file = tmp_path / "credentials"
    file.write_text("[default]\n" + "\n".join(f"{k.lower()}={v}" for k, v in user.items()))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    assert "s3:shared-credentials-file" in check(tmp_path, capsys, s3.url)[1]
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    given = {
        "AccessKeyId": user["AWS_ACCESS_KEY_ID"],
        "SecretAccessKey": user["AWS_SECRET_ACCESS_KEY"],
        "Token": "t",
        "Expiration": "2100-01-01T00:00:00Z",
    }
    with served(Response(json.dumps(given), content_type="application/json")) as url:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{url}/role")
        table = check(tmp_path, capsys, s3.url)[1]
    assert "s3:container-role" in table


def test_check_s3_identity_that_is_not_taken(s3, monkeypatch, tmp_path, capsys):
    """A service account's token that the role does not trust."""
    node(monkeypatch, {})
    (tmp_path / "jwt").write_text("not.a.token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "jwt"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/reader")
    words = "Not authorized to perform sts:AssumeRoleWithWebIdentity"
    error = f"<Error><Code>AccessDenied</Code><Message>{words}</Message></Error>"
    xml = f"<ErrorResponse>{error}</ErrorResponse>"
    with served(Response(xml, 403, content_type="text/xml")) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", url)
        code, table, found = check(tmp_path, capsys, s3.url)
    assert (code, outcome(found)) == (3, "identity_refused")
    assert words in table
    assert "trust policy" in table


def test_check_s3_without_a_bucket_or_prefix(s3, tmp_path, capsys):
    """A bucket that is not there, and one that holds nothing under the prefix."""
    for url, words in (("s3://nonesuch/x", "NoSuchBucket"), (f"{URL}-other", "nothing is listed")):
        code, table, found = check(tmp_path, capsys, s3.url, url=url)
        assert (code, outcome(found)) == (3, "repo_not_found")
        assert words in table


def whole_file(request):
    """Return what a proxy sends that knows no ranges."""
    name = request.path.rpartition("/")[2]
    if name != SHARD.replace("2-of", "1-of"):
        return None
    return Response(b"\0" * 4096, headers={"ETag": etag(sharded_files()[name])})


def other_tag(request):
    """Return what a store sends that does not know `If-Match`, of another object."""
    if not request.path.endswith("config.json"):
        return None
    return Response(b"{}", 206, headers={"ETag": '"other"', "Content-Range": "bytes 0-1/2"})


def gone(request):
    return refusal(404, "NoSuchKey", "gone") if request.path.endswith("config.json") else None


def says(answer):
    return lambda _request: answer


HTML = {"content_type": "text/html"}
OTHERWISE = {
    "page": (says(Response(PAGE, **HTML)), (4, "unknown", "nothing that")),
    "page-404": (says(Response(PAGE, 404, **HTML)), (4, "unknown", "404")),
    "json": (says(Response("{}")), (4, "unknown", "Nothing that")),
    "slow-down": (says(refusal(503, "SlowDown", "Wait")), (4, "rate_limited", "503 SlowDown")),
    "broken": (says(refusal(500, "InternalError", "!")), (4, "hub_unreachable", "500 Internal")),
    "no-ranges": (whole_file, (3, "weights_unreachable", "other bytes of model-00001")),
    "other-tag": (other_tag, (3, "digest_mismatch", "config.json was replaced since")),
    "gone": (gone, (3, "digest_mismatch", "404 NoSuchKey to GetObject")),
    "archived": (
        says(refusal(403, "InvalidObjectState", "archived")),
        (3, "weights_unreachable", "archive class"),
    ),
}


@pytest.mark.parametrize(("before", "row"), OTHERWISE.values(), ids=OTHERWISE.keys())
def test_check_s3_that_answers_otherwise(s3, tmp_path, capsys, before, row):
    """Whatever is no proof blocks, and says what was answered."""
    s3.before = before
    code, table, found = check(tmp_path, capsys, s3.url)
    assert (code, outcome(found)) == row[:2]
    assert row[2].lower() in table.lower()


def test_check_s3_that_nobody_answers_for(s3, tmp_path, capsys):
    """A closed port is told from a refusal: exit 4."""
    code, table, found = check(tmp_path, capsys, f"http://127.0.0.1:{free_port()}")
    assert (code, outcome(found)) == (4, "hub_unreachable")
    assert "EndpointConnectionError" in table


def test_check_s3_listing_that_is_pinned(s3, tmp_path, capsys):
    """`model.revision` takes the digest of a listing; another listing blocks and says what came."""
    _, _, found = check(tmp_path, capsys, s3.url)
    assert check(tmp_path, capsys, s3.url, revision=found["commit"])[0] == 0
    s3.put({"LICENSE": b"added"})
    try:
        code, table, later = check(tmp_path, capsys, s3.url, revision=found["commit"])
    finally:
        s3.delete("LICENSE")
    assert (code, outcome(later)) == (3, "digest_mismatch")
    assert "written last is 'LICENSE'" in table


def test_check_s3_finds_what_a_directory_check_finds(s3, tmp_path, capsys):
    """A missing shard, damaged weights, an engine that cannot load it: before a byte is loaded."""
    s3.put(sharded_files(missing=SHARD), prefix="acme/missing")
    s3.put({**sharded_files(), SHARD: b"\0" * 64}, prefix="acme/damaged")
    s3.put({**single_files(), "config.json": b'{"architectures": ["Other"]}'}, prefix="acme/other")
    for name, words in (("missing", SHARD), ("damaged", "is damaged"), ("other", "Other")):
        url = f"s3://models/acme/{name}"
        code, table, found = check(tmp_path, capsys, s3.url, url=url)
        assert (code, outcome(found)) == (3, "weights_missing"), table
        assert words in table
        assert "/tmp" not in table, "the sketch's place is nobody's business"


def test_check_s3_license_policy(s3, tmp_path, capsys):
    """The card and the text beside the weights are what the policy judges by."""
    card = b"---\nlicense: llama3.2\n---\n# m\n"
    s3.put({**single_files(), "README.md": card}, prefix="acme/licensed")
    for allowed, expected in (("llama3.2", 0), ("apache-2.0", 3)):
        access = {"license": {"allow": [allowed]}}
        url = "s3://models/acme/licensed"
        code, table, found = check(tmp_path, capsys, s3.url, access=access, url=url)
        assert code == expected
    assert outcome(found) == "license_not_allowed"
    assert "allowed are apache-2.0" in table


def test_check_s3_digest(s3, tmp_path, capsys):
    """With the SHA-256 stored it is the digest of the same directory; without, it is refused."""
    files = {**sharded_files(), ".gitattributes": b"*.safetensors filter=lfs\n"}
    wanted = directory_digest(write_files(tmp_path / "copy", files))
    s3.put(files, prefix="acme/hashed", ChecksumAlgorithm="SHA256")
    s3.put(files, prefix="acme/unhashed")
    url = "s3://models/acme/hashed"
    assert check(tmp_path, capsys, s3.url, url=url, digest=wanted)[0] == 0
    assert main(["digest", str(tmp_path / "app.yaml")]) == 0
    assert capsys.readouterr().out.startswith(f"{wanted}  {url}@")
    code, table, found = check(tmp_path, capsys, s3.url, url=url, digest="sha256:" + "0" * 64)
    assert (code, outcome(found)) == (3, "digest_mismatch")
    assert wanted in table
    code, table, found = check(
        tmp_path, capsys, s3.url, url="s3://models/acme/unhashed", digest=wanted
    )
    assert (code, outcome(found)) == (4, "unknown")
    assert "model.digest cannot be proven before the download" in table


def test_check_s3_signature(s3, tmp_path, capsys):
    """The signer is proven by the bundle beside the files; unsigned ones are refused."""
    signer = Signer(tmp_path)
    s3.put(signer.signed(sharded_files()), prefix="acme/signed")
    access = {"signature": {"public_key": str(signer.public)}}
    url = "s3://models/acme/signed"
    assert check(tmp_path, capsys, s3.url, access=access, url=url)[0] == 0
    code, _, found = check(tmp_path, capsys, s3.url, access=access)
    assert (code, outcome(found)) == (3, "signature_invalid")


@pytest.fixture
def key_file(gcs, monkeypatch, tmp_path):
    """The key of a service account on the node, and a store that wants its token."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    account = {
        "type": "service_account",
        "client_email": "reader@project.iam.gserviceaccount.com",
        "private_key": pem,
        "token_uri": f"{gcs.url}/token",
    }
    (tmp_path / "key.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    gcs.token = "ya29.secret-of-the-test"


def test_check_gcs_public(gcs, tmp_path, capsys):
    """A public bucket needs no credentials."""
    code, table, found = check(tmp_path, capsys, gcs.url, url=GCS_URL)
    assert (code, outcome(found)) == (0, "granted"), table


def test_check_gcs_key_file(gcs, key_file, tmp_path, capsys):
    """The account is named, and its token shown nowhere."""
    code, table, found = check(tmp_path, capsys, gcs.url, url=GCS_URL)
    assert (code, outcome(found)) == (0, "granted"), table
    assert "gs:service_account" in table
    assert found["nodes"][0]["token"]["account"].startswith("reader@project.iam")
    assert "secret-of" not in table + json.dumps(found)


def revoked(request):
    if request.path != "/token":
        return None
    words = {"error": "invalid_grant", "error_description": "Invalid JWT Signature."}
    return Response(json.dumps(words), 400, content_type="application/json")


def store_says(answer):
    return lambda request: answer if "/o" in request.path.removeprefix("/token") else None


GCS_BLOCKED = {
    "forbidden": (store_says(gcs_refusal(403, "no access")), (3, "token_scope", "no access")),
    "unknown": (store_says(gcs_refusal(401, "Invalid")), (3, "invalid_token", "401")),
    "no-bucket": (store_says(gcs_refusal(404, "none")), (3, "repo_not_found", "404")),
    "down": (store_says(gcs_refusal(503, "later")), (4, "hub_unreachable", "503")),
    "page": (store_says(Response(PAGE)), (4, "unknown", "no JSON object")),
    "revoked": (revoked, (3, "expired_token", "RefreshError")),
}


@pytest.mark.parametrize(("before", "row"), GCS_BLOCKED.values(), ids=GCS_BLOCKED.keys())
def test_check_gcs_blocked(gcs, key_file, tmp_path, capsys, before, row):
    """Each refusal by its status, with the store's words."""
    gcs.before = before
    code, table, found = check(tmp_path, capsys, gcs.url, url=GCS_URL)
    assert (code, outcome(found)) == row[:2], table
    assert row[2] in table


def test_check_gcs_credentials_that_are_none(gcs, monkeypatch, tmp_path, capsys):
    """No credentials where some are asked for, and a key file that is none."""
    gcs.token = "wanted"
    code, table, found = check(tmp_path, capsys, gcs.url, url=GCS_URL)
    assert (code, outcome(found)) == (3, "no_token"), table
    (tmp_path / "key.json").write_text("{}")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    code, table, found = check(tmp_path, capsys, gcs.url, url=GCS_URL)
    assert (code, outcome(found)) == (3, "malformed_token"), table


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"url": "https://host/model"}, "is not the URL of a model"),
        ({"url": "s3://Bucket/x"}, "is not the URL of a model"),
        ({"url": "s3://bucket/../x"}, "is not the URL of a model"),
        ({"url": URL, "repo_id": "a/b"}, "exactly one of"),
        ({"url": URL, "revision": "v1"}, "the digest of a listing"),
        ({"url": "modelscope://acme"}, "is not the URL of a model"),
        ({"url": URL, "adapters": [{"name": "x", "repo_id": "a/b"}]}, "adapters come from a Hub"),
    ],
)
def test_model_url_is_refused(model, words):
    """What would leave open which bytes were proven is an error of the config."""
    with pytest.raises(ConfigError, match=words):
        parse_args({"model": model})
