"""Models in S3, or in whatever speaks its API: by botocore, with this node's own credentials.

The credentials are those of botocore's chain in this process: variables, the shared file, a role.
Every read says which ETag it wants (`If-Match`), so no bytes of another object are taken.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import botocore.session
from botocore import UNSIGNED
from botocore import exceptions as boto
from botocore.config import Config
from botocore.parsers import ResponseParserError

from serve_app.access.hub.client import Failed
from serve_app.access.hub.listing import PAGES
from serve_app.access.sources.source import Item
from serve_app.access.token import fingerprint
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.config import AccessConfig
from serve_app.redaction import sanitise

Result = TypeVar("Result")

TRIES = 2  # of a request, where nobody answers or the store is at its limit
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_CODES = {
    "AccessDenied": Outcome.TOKEN_SCOPE,
    "AllAccessDisabled": Outcome.REPO_DISABLED,
    "AccountProblem": Outcome.REPO_DISABLED,
    "InvalidAccessKeyId": Outcome.INVALID_TOKEN,
    "InvalidToken": Outcome.INVALID_TOKEN,
    "SignatureDoesNotMatch": Outcome.INVALID_TOKEN,
    "ExpiredToken": Outcome.EXPIRED_TOKEN,
    "TokenRefreshRequired": Outcome.EXPIRED_TOKEN,
    "NoSuchBucket": Outcome.REPO_NOT_FOUND,
    "NoSuchKey": Outcome.DIGEST_MISMATCH,  # it was listed a moment ago
    "PreconditionFailed": Outcome.DIGEST_MISMATCH,
    "InvalidObjectState": Outcome.WEIGHTS_UNREACHABLE,  # in an archive
    "SlowDown": Outcome.RATE_LIMITED,
    "TooManyRequests": Outcome.RATE_LIMITED,
    "RequestTimeout": Outcome.HUB_UNREACHABLE,
}
_EXPIRED = (boto.UnauthorizedSSOTokenError, boto.SSOTokenLoadError, boto.TokenRetrievalError)
_MALFORMED = (boto.PartialCredentialsError, boto.ProfileNotFound, boto.ConfigParseError)
_UNREACHABLE = (
    boto.HTTPClientError,
    boto.ConnectionError,
    boto.ReadTimeoutError,
    boto.IncompleteReadError,
    OSError,
)
_MD5 = re.compile(r"[0-9a-f]{32}")


class Place:
    """One prefix of one bucket.

    Args:
        place: `bucket/prefix`.
        access: the endpoint, if it is not the one of botocore's own settings.
        timeout_s: limit of connecting, and of each read.

    Raises:
        Failed: there are credentials, and they cannot be used.
    """

    def __init__(self, place: str, access: AccessConfig, timeout_s: float) -> None:
        self.requests = 0
        self.credentials = TokenReport()
        self.endpoint = access.endpoint or "S3"
        self._bucket, _, prefix = place.rstrip("/").partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        session = botocore.session.Session()
        config: dict[str, Any] = {
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "retries": {"total_max_attempts": TRIES, "mode": "standard"},
        }
        with _translating():
            found = session.get_credentials()
            if found is None:
                config["signature_version"] = UNSIGNED  # a public bucket needs none
            else:
                key = found.get_frozen_credentials().access_key
                self.credentials = TokenReport(f"s3:{found.method}", fingerprint(key))
            if access.endpoint is not None:  # stores other than Amazon's know no host per bucket
                config["s3"] = {"addressing_style": "path"}
            self._client = session.create_client(
                "s3",
                region_name=session.get_config_variable("region") or "us-east-1",
                endpoint_url=access.endpoint,
                config=Config(**config),
            )
            self.endpoint = self._client.meta.endpoint_url

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def items(self) -> Iterator[Item]:
        """Yield every object below the prefix."""
        more: dict[str, str] = {}
        for _ in range(PAGES):
            page = self._ask(
                self._client.list_objects_v2, Bucket=self._bucket, Prefix=self._prefix, **more
            )
            if page.get("Name") != self._bucket:
                raise Failed(Outcome.UNKNOWN, "the answer is no list of the bucket's objects")
            for each in page.get("Contents", ()):
                written = each.get("LastModified")
                yield Item(
                    name=each["Key"].removeprefix(self._prefix),
                    size=each.get("Size", -1),
                    tag=each.get("ETag", ""),
                    key=each["Key"],
                    modified=written.strftime("%Y-%m-%dT%H:%M:%SZ") if written else "",
                )
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}
        raise Failed(Outcome.UNKNOWN, f"the list of objects does not end within {PAGES} pages")

    def read(self, item: Item, start: int, stop: int) -> bytes:
        """Return these bytes of an object as it was listed, all of them."""
        answer = self._ask(
            self._client.get_object,
            Bucket=self._bucket,
            Key=item.key,
            Range=f"bytes={start}-{stop - 1}",
            IfMatch=item.tag,
        )
        if answer.get("ETag") != item.tag:  # a store that does not know `If-Match`
            raise Failed(Outcome.DIGEST_MISMATCH, f"{item.name} was replaced since it was listed")
        with _translating(), closing(answer["Body"]) as body:
            # Not what a proxy sends that knows no ranges: that may be all of 100 GB.
            content: bytes = body.read(stop - start + 1)
        if answer["ResponseMetadata"]["HTTPStatusCode"] != 206 or len(content) != stop - start:
            message = f"other bytes of {item.name} came than were asked for"
            raise Failed(Outcome.WEIGHTS_UNREACHABLE, message)
        return content

    def stated(self, item: Item) -> Mapping[str, str]:
        """Return the hashes that are stored with an object, of all of its content."""
        found = self._ask(
            self._client.head_object,
            Bucket=self._bucket,
            Key=item.key,
            IfMatch=item.tag,
            ChecksumMode="ENABLED",
        )
        hashes = {}
        # Of parts it is a hash of hashes, and has a number behind it.
        if found.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            sha256 = found.get("ChecksumSHA256", "")
            if "-" not in sha256 and len(sha256) == 44:
                hashes["sha256"] = base64.b64decode(sha256).hex()
        tag = found.get("ETag", "").strip('"')
        # An ETag is the MD5 unless the object came in parts, or is encrypted with a key of KMS's.
        if found.get("ServerSideEncryption", "AES256") == "AES256" and _MD5.fullmatch(tag):
            hashes["md5"] = tag
        return hashes

    def _ask(self, call: Callable[..., Result], **arguments: Any) -> Result:
        self.requests += 1
        with _translating():
            return call(**arguments)


@contextmanager
def _translating() -> Iterator[None]:
    """Raise what botocore raises as `Failed`, by the code of the store's answer."""
    try:
        yield
    except boto.ClientError as error:
        raise Failed(*_answered(error)) from None
    except (boto.BotoCoreError, ResponseParserError, OSError) as error:
        raise Failed(*_broken(error)) from None


def _answered(error: boto.ClientError) -> tuple[Outcome, str]:
    """Return the outcome and the words for an answer that is a refusal."""
    said, facts = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
    code, status = str(said.get("Code", "")), facts.get("HTTPStatusCode", 0)
    words = str(said.get("Message", "")) or "no words"
    if error.operation_name not in ("ListObjectsV2", "GetObject", "HeadObject"):
        message = f"{error.operation_name} for the credentials was answered {status} {code}"
        return Outcome.IDENTITY_REFUSED, sanitise(f"{message}: {words}")
    message = f"the store answered {status} {code} to {error.operation_name}: {words}"
    known = _CODES.get(code)
    if known is None and error.operation_name == "HeadObject":  # which has no body for a code
        by_status = {403: "AccessDenied", 404: "NoSuchKey", 412: "PreconditionFailed"}
        known = _CODES.get(by_status.get(status, ""))
    if known is None:
        # botocore makes a 500 without a code of a 200 that is no answer of S3's.
        is_down = status >= 500 and not (status == 500 and code == "500")
        known = Outcome.HUB_UNREACHABLE if is_down else Outcome.UNKNOWN
    return known, sanitise(message)


def _broken(error: Exception) -> tuple[Outcome, str]:
    """Return the outcome and the words where no answer came, or none that S3 gives."""
    if isinstance(error, ResponseParserError):
        return Outcome.UNKNOWN, "the answer is not one that S3 gives"
    kind = type(error).__name__
    # Their own words may be those of a program that prints credentials.
    if isinstance(error, boto.CredentialRetrievalError | boto.NoCredentialsError):
        provider = getattr(error, "kwargs", {}).get("provider", "the chain")
        return Outcome.NO_TOKEN, f"no credentials came from {provider} ({kind})"
    if isinstance(error, _EXPIRED):
        return Outcome.EXPIRED_TOKEN, f"the login has ended ({kind})"
    if isinstance(error, _MALFORMED):
        return Outcome.MALFORMED_TOKEN, sanitise(f"{kind}: {error}")
    known = isinstance(error, _UNREACHABLE)
    return Outcome.HUB_UNREACHABLE if known else Outcome.UNKNOWN, sanitise(f"{kind}: {error}")
