"""Object stores on loopback that others wrote, and what may stand before them.

moto plays S3, with users and policies; an emulator plays Google Cloud Storage. ModelScope is played
by what its own client of version 0.5 expects of it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import httpx
from gcp_storage_emulator import server as gcs_server
from moto import settings
from moto.core.authorization import ActionAuthenticatorMixin
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server
from werkzeug.wrappers import Request, Response

from tests.ports import free_port

BUCKET, PREFIX = "models", "acme/tiny"
URL = f"s3://{BUCKET}/{PREFIX}"
GCS_URL = f"gs://{BUCKET}/{PREFIX}"
MODELSCOPE_URL = "modelscope://acme/tiny"
READ = ("s3:ListBucket", "s3:GetObject")

Answer = Callable[[Request], Response | None]


@dataclass
class LocalS3:
    """One running server.

    Args:
        url: of its API.
        expired: access keys of sessions that have ended, which moto does not know.
        before: called with each request; an answer of it takes the place of the store's.
        seen: what was asked, as `METHOD /path?query`, with the access key.
    """

    url: str
    expired: set[str] = field(default_factory=set)
    before: Answer = lambda _request: None
    seen: list[tuple[str, str]] = field(default_factory=list)

    def client(self, service: str = "s3") -> Any:
        """Return a client that may do everything."""
        return boto3.client(
            service,
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="root",
            aws_secret_access_key="root",
        )

    def put(self, files: Mapping[str, bytes | Path], *, prefix: str = PREFIX, **extra: Any) -> None:
        """Store files; without policies meanwhile."""
        with _open_to_all():
            client = self.client()
            client.create_bucket(Bucket=BUCKET)  # nothing happens if it is there
            for name, content in files.items():
                raw = content.read_bytes() if isinstance(content, Path) else content
                client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=raw, **extra)

    def delete(self, name: str) -> None:
        """Remove a file."""
        with _open_to_all():
            self.client().delete_object(Bucket=BUCKET, Key=f"{PREFIX}/{name}")

    def user(self, *actions: str) -> dict[str, str]:
        """Make a user with these rights alone; returns the variables that make a process it."""
        with _open_to_all():
            iam = self.client("iam")
            name = f"user-{free_port()}"
            iam.create_user(UserName=name)
            if actions:
                allowed = [{"Effect": "Allow", "Action": [*actions], "Resource": "*"}]
                policy = json.dumps({"Version": "2012-10-17", "Statement": allowed})
                iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=policy)
            key = iam.create_access_key(UserName=name)["AccessKey"]
        return {
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"],
        }


@contextmanager
def local_s3() -> Iterator[LocalS3]:
    """Run an S3 that checks signatures and policies."""
    inner = DomainDispatcherApplication(create_backend_app)
    running = LocalS3("")

    def application(environ: Any, start: Any) -> Iterable[bytes]:
        request = Request(environ)
        signed = request.headers.get("Authorization", "").partition("Credential=")[2]
        key = signed.partition("/")[0]
        running.seen.append((f"{request.method} {request.full_path}", key))
        answer = running.before(request)
        if not key and "/moto-api/" not in request.path:
            answer = refusal(
                403, "AccessDenied", "Access Denied"
            )  # which moto does not know either
        if key in running.expired:
            answer = refusal(400, "ExpiredToken", "The provided token has expired.")
        return (answer or inner)(environ, start)

    with (
        served(application) as running.url,
        mock.patch.object(settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0),
    ):
        yield running
        with _open_to_all():
            httpx.post(f"{running.url}/moto-api/reset")


@contextmanager
def served(application: Any) -> Iterator[str]:
    """Run a WSGI application on loopback; yields its URL."""

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_request(self, *_: object) -> None:
            return

    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass
class LocalGcs:
    """One running emulator, behind what it does not do: ask for a token, refuse, and count.

    Args:
        url: of its API.
        token: what a caller must send; None asks for nothing.
        before: called with each request; an answer of it takes the place of the store's.
    """

    url: str = ""
    token: str | None = None
    before: Answer = lambda _request: None

    def put(self, files: Mapping[str, bytes | Path]) -> None:
        """Store files."""
        token, self.token = self.token, None
        for name, content in files.items():
            raw = content.read_bytes() if isinstance(content, Path) else content
            place = f"{self.url}/upload/storage/v1/b/{BUCKET}/o"
            query = {"uploadType": "media", "name": f"{PREFIX}/{name}"}
            httpx.post(place, params=query, content=raw).raise_for_status()
        self.token = token


@contextmanager
def local_gcs() -> Iterator[LocalGcs]:
    """Run an emulator of Google Cloud Storage."""
    port = free_port()
    running = LocalGcs()
    emulator = gcs_server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    emulator.start()

    def application(environ: Any, start: Any) -> Iterable[bytes]:
        request = Request(environ)
        sent = request.headers.get("Authorization", "").removeprefix("Bearer ")
        answer = running.before(request)
        if request.path == "/token":
            answer = answer or Response(json.dumps({"access_token": running.token or "t"}))
        elif running.token is not None and sent != running.token:
            answer = gcs_refusal(
                401 if sent else 403, "Anonymous caller" if not sent else "Invalid"
            )
        return (answer or _passed_on(request, f"http://127.0.0.1:{port}"))(environ, start)

    try:
        with served(application) as running.url:
            yield running
    finally:
        emulator.stop()


def _passed_on(request: Request, url: str) -> Response:
    wanted = {k: v for k, v in request.headers.items() if k in ("Range", "Content-Type")}
    target = f"{url}{request.full_path.rstrip('?')}"
    got = httpx.request(request.method, target, headers=wanted, content=request.get_data())
    kept = {k: v for k, v in got.headers.items() if k in ("content-type", "content-range")}
    return Response(got.content, got.status_code, kept)


def gcs_refusal(status: int, words: str) -> Response:
    """Return an answer as Google Cloud Storage refuses."""
    body = json.dumps({"error": {"code": status, "message": words}})
    return Response(body, status, content_type="application/json")


@dataclass
class LocalModelScope:
    """A site that answers as ModelScope does, as far as its own client depends on it.

    Args:
        files: of `acme/tiny`.
        url: of the site; what it stores large files at is another one.
        known: accounts by their tokens; any other token is ignored, as if there were none.
        readers: accounts that may read the repository; None lets everybody.
        before: called with each request; an answer of it takes the place of the site's.
        seen: what was asked of which host, with the token.
    """

    files: dict[str, bytes]
    url: str = ""
    known: dict[str, str] = field(default_factory=dict)
    readers: set[str] | None = None
    before: Answer = lambda _request: None
    seen: list[tuple[str, str]] = field(default_factory=list)

    def listed(self) -> list[dict[str, Any]]:
        """Return the list of files."""
        found: list[dict[str, Any]] = [{"Path": "assets", "Name": "assets", "Type": "tree"}]
        for name, raw in self.files.items():
            sha256 = hashlib.sha256(raw).hexdigest()
            facts = {"Path": name, "Name": name, "Type": "blob", "Size": len(raw)}
            found.append({**facts, "Sha256": sha256, "IsLFS": name.endswith(".safetensors")})
        return found

    def answer(self, request: Request, stored_at: str) -> Response:
        """Answer one request."""
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        self.seen.append((f"{request.host_url}{request.path[1:]}", token))
        account = self.known.get(token, "")
        if found := self.before(request):
            return found
        if request.path == "/openapi/v1/users/me":
            return (
                _json({"success": True, "data": {"username": account}})
                if account
                else _json(
                    {"success": False, "code": "InvalidAuthentication", "message": "bad token"}, 401
                )
            )
        if not request.path.startswith("/api/v1/models/acme/tiny/repo") or (
            self.readers is not None and account not in self.readers
        ):
            words = "Model acme/tiny not exist, or you have no permission"
            return _json({"Code": 10010205001, "Success": False, "Message": words}, 404)
        if request.path.endswith("/files"):
            return _json({"Code": 200, "Success": True, "Data": {"Files": self.listed()}})
        name = request.args["FilePath"]
        if name.endswith(".safetensors"):
            return Response(status=302, headers={"Location": f"{stored_at}/{name}?signed=1"})
        return _ranged(request, self.files[name])


@contextmanager
def local_modelscope(files: Mapping[str, bytes | Path]) -> Iterator[LocalModelScope]:
    """Run such a site with a repository."""
    contents = {k: v.read_bytes() if isinstance(v, Path) else v for k, v in files.items()}
    running = LocalModelScope(contents)

    def stored(environ: Any, start: Any) -> Iterable[bytes]:
        request = Request(environ)
        running.seen.append((request.url, request.headers.get("Authorization", "")))
        found = running.before(request) or _ranged(request, running.files[request.path[1:]])
        return found(environ, start)

    with served(stored) as place:

        def site(environ: Any, start: Any) -> Iterable[bytes]:
            return running.answer(Request(environ), place)(environ, start)

        with served(site) as running.url:
            yield running


def _json(payload: object, status: int = 200) -> Response:
    return Response(json.dumps(payload), status, content_type="application/json")


def _ranged(request: Request, content: bytes) -> Response:
    start, stop = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
    place = {"Content-Range": f"bytes {start}-{stop}/{len(content)}"}
    return Response(content[start : stop + 1], 206, headers=place)


def etag(content: bytes) -> str:
    """Return what S3 calls an object of this content that came in one part."""
    return f'"{hashlib.md5(content).hexdigest()}"'


def refusal(status: int, code: str, words: str) -> Response:
    """Return an answer as S3 refuses."""
    xml = f"<Error><Code>{code}</Code><Message>{words}</Message></Error>"
    return Response(xml, status, content_type="application/xml")


@contextmanager
def _open_to_all() -> Iterator[None]:
    with mock.patch.object(settings, "INITIAL_NO_AUTH_ACTION_COUNT", float("inf")):
        yield
    ActionAuthenticatorMixin.request_count = 0
