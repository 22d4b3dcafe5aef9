"""Object stores on loopback that others wrote, and what may stand before them.

moto plays S3, with users and policies; an emulator plays Google Cloud Storage.
"""

from __future__ import annotations

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


def refusal(status: int, code: str, words: str) -> Response:
    """Return an answer as S3 refuses."""
    xml = f"<Error><Code>{code}</Code><Message>{words}</Message></Error>"
    return Response(xml, status, content_type="application/xml")


@contextmanager
def _open_to_all() -> Iterator[None]:
    with mock.patch.object(settings, "INITIAL_NO_AUTH_ACTION_COUNT", float("inf")):
        yield
    ActionAuthenticatorMixin.request_count = 0
