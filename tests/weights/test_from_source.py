"""Weights of an object store on their way to a node: resumed, compared, and never another's."""

import hashlib

import pytest
from werkzeug.wrappers import Response

from serve_app.access.digest import directory_digest
from serve_app.access.hub.model_files import listed
from serve_app.access.hub.probe import check_here
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import AccessDenied, ModelLoadError
from serve_app.weights import from_source
from serve_app.weights.fetch import fetch, lacking_bytes
from serve_app.weights.store import Store
from tests.access.cases import sharded_files
from tests.conftest import safetensors
from tests.signing import Signer, write_files
from tests.stores import GCS_URL, READ, URL, etag, local_gcs, local_s3, refusal

SHARD = "model-00002-of-00002.safetensors"
MODEL = ModelConfig(url=URL)
LARGE = {**sharded_files(), SHARD: safetensors({"w1": [64, 1024]})}  # some parts of it


@pytest.fixture(autouse=True)
def no_cloud(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setattr(from_source, "PART_BYTES", 32 << 10)
    monkeypatch.setattr(from_source, "PAUSE_S", 0.01)


@pytest.fixture
def s3(monkeypatch):
    with local_s3() as running:
        running.put(LARGE)
        for name, value in running.user(*READ).items():
            monkeypatch.setenv(name, value)
        yield running


def proven(s3, model=MODEL, **access):
    """Return the access and the pin of what is there now."""
    config = AccessConfig(endpoint=s3.url, **access)
    verdict = check_here(model, config)
    assert verdict.outcome == "granted", verdict.line()
    return config, verdict.commit


def parts(s3, name=SHARD):
    return [what for what, _ in s3.seen if what.startswith("GET") and name in what]


def test_fetch_from_a_store_lands_in_the_cache_and_is_found_there(s3):
    """Every file, with its bytes, named by its SHA-256; the next replica asks for nothing."""
    access, pin = proven(s3)
    assert lacking_bytes(MODEL, access, pin) == sum(len(raw) for raw in LARGE.values())
    fetched = fetch(MODEL, access, pin)
    assert fetched.hub_bytes == sum(len(raw) for raw in LARGE.values())
    for name, raw in LARGE.items():
        assert (fetched.directory / name).read_bytes() == raw
        assert (fetched.directory / name).resolve().name == hashlib.sha256(raw).hexdigest()
    assert len(parts(s3)) > 4, "a large file comes in parts"
    s3.seen.clear()
    again = fetch(MODEL, access, pin)
    assert (again.hub_bytes, again.cache_bytes) == (0, fetched.hub_bytes)
    assert lacking_bytes(MODEL, access, pin) == 0
    assert not s3.seen


def test_fetch_from_a_store_goes_on_where_it_broke_off(s3):
    """What a dead process left of this very object is not asked for again."""
    access, pin = proven(s3)
    left = 2

    def breaks(request):
        nonlocal left
        if SHARD in request.path:
            left -= 1
        return (
            refusal(500, "InternalError", "broken") if left < 0 and SHARD in request.path else None
        )

    s3.before = breaks
    with pytest.raises(ModelLoadError, match="500 InternalError"):
        fetch(MODEL, access, pin)
    s3.before = lambda _request: None
    s3.seen.clear()
    fetched = fetch(MODEL, access, pin)
    assert (fetched.directory / SHARD).read_bytes() == LARGE[SHARD]
    assert 0 < len(parts(s3)) < len(LARGE[SHARD]) / from_source.PART_BYTES
    assert fetched.hub_bytes < sum(len(raw) for raw in LARGE.values())


REPLACED = r"since it was pinned|412 PreconditionFailed"


def test_fetch_from_a_store_refuses_an_object_that_was_replaced(s3):
    """Another object of the same name and size is not what the gate has proven."""
    access, pin = proven(s3)
    s3.put({SHARD: LARGE[SHARD][:-1] + b"\1"})
    with pytest.raises(ModelLoadError, match=REPLACED):
        fetch(MODEL, access, pin)


@pytest.mark.parametrize("name", [SHARD, "LICENSE"])
def test_fetch_from_a_store_refuses_what_changes_meanwhile(s3, name):
    """A file that is replaced between two of its parts, and one that is added."""
    access, pin = proven(s3)
    asked = 0

    def changes(request):
        nonlocal asked
        asked += request.method == "GET" and SHARD in request.path
        if asked == 2:
            s3.before = lambda _request: None
            s3.put({name: b"\1" * len(LARGE[SHARD])})

    s3.before = changes
    with pytest.raises(ModelLoadError, match=REPLACED):
        fetch(MODEL, access, pin)
    assert listed(MODEL.cache_id, pin) is None, "nobody takes it for a whole copy"
    s3.delete("LICENSE")
    if name == "LICENSE":
        s3.seen.clear()
        fetch(MODEL, access, pin)
        assert not parts(s3), "what had come was asked for again"


def test_fetch_from_a_store_compares_its_hashes(s3):
    """A proxy that answers with other bytes under the right ETag is found out by the MD5."""
    access, pin = proven(s3)

    def damages(request):
        if SHARD not in request.path or request.method != "GET":
            return None
        size = len(LARGE[SHARD])
        start, stop = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
        place = {"Content-Range": f"bytes {start}-{stop}/{size}", "ETag": etag(LARGE[SHARD])}
        return Response(b"\0" * (stop + 1 - start), 206, headers=place)

    s3.before = damages
    with pytest.raises(ModelLoadError, match="than its MD5 says"):
        fetch(MODEL, access, pin)
    s3.before = lambda _request: None
    assert fetch(MODEL, access, pin).hub_bytes, "nothing of it is gone on with"


def test_fetch_from_a_store_that_refuses_meanwhile(s3, monkeypatch):
    """A right that was withdrawn is a refusal, which a replica does not take for an outage."""
    access, pin = proven(s3)
    for name, value in s3.user("s3:ListBucket").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AccessDenied, match="403 AccessDenied"):
        fetch(MODEL, access, pin)


def test_fetch_from_a_store_with_a_digest(s3, tmp_path):
    """The bytes that are loaded are those of `model.digest`, also where the copy was changed."""
    s3.put(LARGE, ChecksumAlgorithm="SHA256")
    model = ModelConfig(url=URL, digest=directory_digest(write_files(tmp_path / "copy", LARGE)))
    access, pin = proven(s3, model)
    fetched = fetch(model, access, pin)
    (fetched.directory / "extra.safetensors").write_bytes(b"not listed")
    with pytest.raises(ModelLoadError, match=r"extra\.safetensors"):
        fetch(model, access, pin)


def test_fetch_from_a_store_with_a_signature(s3, tmp_path):
    """Files of another content than was signed are not loaded, though the store lists no hashes."""
    signer = Signer(tmp_path)
    signed = signer.signed(LARGE)
    s3.put(signed)
    access, pin = proven(s3, signature=signer.demanded)
    assert fetch(MODEL, access, pin).hub_bytes
    s3.put({SHARD: LARGE[SHARD][:-1] + b"\1"})
    access, pin = proven(s3, signature=signer.demanded)
    with pytest.raises(ModelLoadError, match="other bytes than were signed"):
        fetch(MODEL, access, pin)


def test_store_of_a_source_has_a_repository_of_its_own(s3):
    """Two URLs that end alike share nothing, and the names are ones of the cache."""
    others = [ModelConfig(url=url) for url in (URL, f"{URL}-2", "s3://other/acme/tiny")]
    names = {Store(each.cache_id, "0" * 64).blobs.parent.name for each in others}
    assert len(names) == 3
    assert all(name.startswith("models--s3--tiny-") for name in names)


def test_fetch_from_gcs(monkeypatch):
    """The same, of another store: by generation, and compared with its MD5."""
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    model = ModelConfig(url=GCS_URL)
    with local_gcs() as gcs:
        gcs.put(LARGE)
        access, pin = proven(gcs, model)
        fetched = fetch(model, access, pin)
        assert (fetched.directory / SHARD).read_bytes() == LARGE[SHARD]
        gcs.put({"config.json": LARGE["config.json"]})
        verdict = check_here(model, access, commit=pin)
        assert verdict.outcome == "digest_mismatch"
