r"""What a source without commits is: a listing, ranged reads, and the digest of its listing.

    pin = SHA-256 of, for each file in the order of its name's UTF-8 bytes,
          NAME "\0" SIZE "\0" TAG "\n"

TAG is what the source changes whenever the file does: S3's ETag, GCS's generation, a SHA-256. The
pin stands where a commit stands. It does not lead to the files as they were: they are compared
with it by every node, before the rollout and again when a replica has loaded them.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol

from serve_app.access.digest import is_large, large_rules
from serve_app.access.hub.client import Failed
from serve_app.access.hub.listing import ENTRIES, MAX_FILE_BYTES
from serve_app.access.hub.model_files import content_hash
from serve_app.access.verdict import Outcome, TokenReport
from serve_app.checkpoint import files
from serve_app.checkpoint.names import escape_fault, shown
from serve_app.config import AccessConfig, ModelConfig
from serve_app.redaction import sanitise

READ_BYTES = 64 << 20  # of files that are read for the digest, together
_GIT = "0" * 40  # the kind of hash that a small file counts by
_MODULES = {"s3": "s3", "gs": "gcs", "modelscope": "modelscope"}


@dataclass(frozen=True, slots=True)
class Item:
    """One file of a source.

    Args:
        name: below the URL, with `/`.
        size: bytes.
        tag: another one whenever the file is another one.
        key: its name in the source.
        modified: when it was last written, as a person reads it and as it sorts.
        sha256: of its content, where the listing states it.
    """

    name: str
    size: int
    tag: str
    key: str
    modified: str = ""
    sha256: str | None = None


class Source(Protocol):
    """One place that a model lies in, asked by this node's own credentials.

    Whatever it does raises `Failed` alone, with words that hold no secret.
    """

    requests: int

    @property
    def credentials(self) -> TokenReport:
        """Which credentials are sent, without their value."""
        ...

    @property
    def endpoint(self) -> str:
        """Who is asked."""
        ...

    def items(self) -> Iterator[Item]:
        """Yield every file."""
        ...

    def read(self, item: Item, start: int, stop: int) -> bytes:
        """Return these bytes of a file as it was listed, all of them."""
        ...

    def stated(self, item: Item) -> Mapping[str, str]:
        """Return the hashes that the source states of a file's content, hex, by `hashlib`'s name.

        Asks again, so it is of the file as it is now.
        """
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


@contextmanager
def opened(
    model: ModelConfig, access: AccessConfig, *, timeout_s: float | None = None
) -> Iterator[Source]:
    """Open the source that a model's URL names; only now its library is imported.

    Args:
        model: names it.
        access: the endpoint, and limits.
        timeout_s: limit of one request; None is that of `access`.

    Raises:
        Failed: the library is not installed here, or there are credentials that cannot be used.
    """
    scheme, _, place = str(model.url).partition("://")
    try:
        module = importlib.import_module(f"serve_app.access.sources.{_MODULES[scheme]}")
    except ImportError as error:
        message = f"{error.name} is not installed on this node, so no {scheme}:// can be read"
        remedy = (
            f"Install the extra `{_MODULES[scheme]}` of serve-app in the environment of the "
            "replicas."
        )
        raise Failed(Outcome.UNKNOWN, message, remedy=remedy) from None
    source: Source = module.Place(place, access, timeout_s or access.timeout_s)
    with closing(source):
        yield source


def listing_of(source: Source) -> dict[str, Item]:
    """Return a source's files by name.

    Raises:
        Failed: it does not answer, refuses, or lists what no model can have.
    """
    items: dict[str, Item] = {}
    try:
        for item in source.items():
            _take(items, item)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Failed(Outcome.UNKNOWN, "the listing is none that a store gives") from None
    if not items:
        raise Failed(Outcome.REPO_NOT_FOUND, "nothing is listed there")
    return items


def pin_of(items: Mapping[str, Item]) -> str:
    """Return the digest of a listing, 64 hex digits."""
    whole = hashlib.sha256()
    for name in sorted(items, key=lambda name: name.encode("utf-8", "surrogateescape")):
        item = items[name]
        line = f"{name}\0{item.size}\0{item.tag}\n"
        whole.update(line.encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def require_pin(items: Mapping[str, Item], pin: str) -> None:
    """Compare a listing with what was pinned.

    Raises:
        Failed: it is another one; names the file that was written last.
    """
    found = pin_of(items)
    if found == pin:
        return
    last = max(items.values(), key=lambda item: item.modified)
    written = f"; written last is {shown(last.name)}, {last.modified}" if last.modified else ""
    message = (
        f"a file was added, removed or replaced since it was pinned: the listing's digest is "
        f"{found[:12]}, pinned is {pin[:12]}{written}"
    )
    raise Failed(Outcome.DIGEST_MISMATCH, sanitise(message))


def whole(source: Source, item: Item, limit: int | None = None) -> bytes:
    """Return a small file.

    Raises:
        Failed: it is larger than such a file may be, or does not come.
    """
    limit = limit or files.size_limit(item.name) or files.SMALL_BYTES
    if item.size > limit:
        raise Failed(Outcome.WEIGHTS_MISSING, f"{item.name} has more than {limit:,} bytes")
    content = source.read(item, 0, item.size) if item.size else b""
    if item.sha256 is not None and hashlib.sha256(content).hexdigest() != item.sha256:
        message = f"{shown(item.name)} came with other bytes than its listed SHA-256 says"
        raise Failed(Outcome.DIGEST_MISMATCH, message)
    return content


def content_hashes(source: Source, items: Mapping[str, Item]) -> dict[str, str]:
    """Return the hash of each file's content by its name, as `model.digest` has it.

    Small files are read; of large ones the source must state it.

    Raises:
        Failed: it does not, or the small ones are too many.
    """
    rules = None
    if ".gitattributes" in items:
        rules = large_rules(whole(source, items[".gitattributes"], files.MIB))
    found: dict[str, str] = {}
    left = READ_BYTES
    for name, item in items.items():
        if is_large(name, item.size, rules):
            sha256 = item.sha256 or source.stated(item).get("sha256")
            if sha256 is None:
                raise Failed(Outcome.UNKNOWN, _unproven(name), remedy=_STATE_IT)
            found[name] = sha256
            continue
        left -= item.size
        if left < 0:
            message = f"the small files have more than {READ_BYTES:,} bytes together"
            raise Failed(Outcome.UNKNOWN, f"model.digest cannot be proven: {message}")
        found[name] = content_hash(whole(source, item, READ_BYTES), _GIT)
    return found


def _take(items: dict[str, Item], item: Item) -> None:
    """Add a listed file, if it is one that a model can have."""
    if item.size == 0 and item.name.rpartition("/")[2] == "":
        return  # what consoles make to show a folder
    if fault := escape_fault(item.name):
        raise Failed(Outcome.UNKNOWN, f"a listed name {fault}: {shown(item.name)}")
    if not 0 <= item.size <= MAX_FILE_BYTES or not item.tag:
        raise Failed(Outcome.UNKNOWN, f"no possible size or tag of {shown(item.name)} is listed")
    if item.name in items:
        raise Failed(Outcome.UNKNOWN, f"the listing names {shown(item.name)} twice")
    items[item.name] = item
    if len(items) > ENTRIES:
        raise Failed(Outcome.UNKNOWN, f"more than {ENTRIES:,} files are listed")


_STATE_IT = (
    "Leave model.digest out and pin the listing: model.revision takes the digest that `serve-app "
    "check --json` shows as `commit`. In S3 a file can also be stored with its SHA-256 (`aws s3api "
    "put-object --checksum-algorithm SHA256`, in one part)."
)


def _unproven(name: str) -> str:
    return (
        f"model.digest cannot be proven before the download: no SHA-256 of the whole of "
        f"{shown(name)} is stored with it"
    )
