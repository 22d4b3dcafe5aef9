"""JSON of the Hub about accounts and repositories, in the shape the clients parse."""

from __future__ import annotations

import hashlib
from typing import Any
from urllib.parse import quote, urlencode

import yaml

from scripts.local_hub.behaviours import Account, Behaviour
from scripts.local_hub.repos import Repo, RepoFile
from scripts.local_hub.wire import Request

MASK = "*" * 64
CREATED_AT = "2026-01-05T09:00:00.000Z"


def whoami_payload(account: Account) -> dict[str, Any]:
    """Describe the account and the token's role."""
    access: dict[str, Any] = {
        "displayName": "serve-app",
        "role": "read",
        "createdAt": CREATED_AT,
    }
    if account.behaviour in {Behaviour.fine_grained, Behaviour.fine_grained_elsewhere}:
        access["role"] = "fineGrained"
        access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": []}
    if account.behaviour is Behaviour.fine_grained_elsewhere:
        access["fineGrained"]["scoped"] = [
            {
                "entity": {"_id": "0" * 24, "type": "model", "name": f"{account.name}/elsewhere"},
                "permissions": ["repo.content.read"],
            }
        ]
    return {
        "type": "user",
        "id": hashlib.sha256(account.name.encode()).hexdigest()[:24],
        "name": account.name,
        "fullname": account.name.capitalize(),
        "isPro": False,
        "orgs": [],
        "auth": {"type": "access_token", "accessToken": access},
    }


def model_payload(
    repo: Repo,
    commit: str,
    *,
    disabled: bool,
    blobs: bool,
    masked: bool,
    expand: list[str],
) -> dict[str, Any]:
    """Describe a model at a commit; public, whatever the gate says about content."""
    card = _card(repo.files(commit).get("README.md"))
    payload = {
        "_id": hashlib.sha256(repo.repo_id.encode()).hexdigest()[:24],
        "id": repo.repo_id,
        "modelId": repo.repo_id,
        "author": repo.repo_id.rpartition("/")[0] or None,
        "sha": commit,
        "createdAt": CREATED_AT,
        "lastModified": CREATED_AT,
        "private": repo.readers is not None,
        "gated": repo.gated,
        "disabled": disabled,
        "downloads": 0,
        "likes": 0,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["transformers", "safetensors", "text-generation", *_license_tags(card)],
        **({"cardData": card} if card else {}),
        "siblings": [
            _sibling(file, blobs=blobs, masked=masked) for file in repo.files(commit).values()
        ],
    }
    if expand:
        payload = {key: payload[key] for key in ("_id", "id", *expand) if key in payload}
    return payload


def _card(readme: RepoFile | None) -> dict[str, Any]:
    """Return the metadata at the head of a model card."""
    text = b"".join(readme.chunks()).decode() if readme else ""
    if not text.startswith("---\n"):
        return {}
    head = yaml.safe_load(text.removeprefix("---\n").partition("\n---")[0])
    return head if isinstance(head, dict) else {}


def _license_tags(card: dict[str, Any]) -> list[str]:
    stated = card.get("license", [])
    return [f"license:{each}" for each in (stated if isinstance(stated, list) else [stated])]


def _sibling(file: RepoFile, *, blobs: bool, masked: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": file.path}
    if blobs:
        sibling |= {"size": file.size, "blobId": file.blob_id}
        if file.is_large:
            sibling["lfs"] = {
                "sha256": MASK if masked else file.sha256,
                "size": file.size,
                "pointerSize": file.pointer_size,
            }
    return sibling


def tree_page(
    repo: Repo, commit: str, request: Request, *, folder: str, masked: bool, size: int
) -> tuple[list[dict[str, Any]], str | None] | None:
    """List one page of a folder.

    Returns:
        The entries and the next page's path and query, None on the last page; None altogether
        if there is no such folder.
    """
    files = repo.files(commit)
    prefix = f"{folder}/" if folder else ""
    below = [file for path, file in files.items() if path.startswith(prefix)]
    if not below:
        return None
    entries = _entries(repo, below, request, prefix=prefix, masked=masked)
    start = _number(request, "cursor", 0)
    size = max(1, min(size, _number(request, "limit", size)))
    if start + size >= len(entries):
        return entries[start:], None
    kept = {key: values[-1] for key, values in request.query.items()}
    query = urlencode({**kept, "cursor": start + size})
    return entries[start : start + size], f"{quote(request.path)}?{query}"


def _number(request: Request, name: str, default: int) -> int:
    text = request.query.get(name, [""])[-1]
    return int(text) if text.isdecimal() else default


def _entries(
    repo: Repo, below: list[RepoFile], request: Request, *, prefix: str, masked: bool
) -> list[dict[str, Any]]:
    recursive, expand = request.flag("recursive"), request.flag("expand")
    listed: dict[str, dict[str, Any]] = {}
    for file in below:
        *folders, _ = file.path.removeprefix(prefix).split("/")
        parents = [prefix + "/".join(folders[: i + 1]) for i in range(len(folders))]
        for parent in parents if recursive else parents[:1]:
            listed.setdefault(parent, _folder_entry(parent))
        if recursive or not folders:
            listed[file.path] = _file_entry(repo, file, masked=masked, expand=expand)
    return list(listed.values())


def _folder_entry(path: str) -> dict[str, Any]:
    oid = hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest()
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


def _file_entry(repo: Repo, file: RepoFile, *, masked: bool, expand: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "oid": file.blob_id,
        "size": file.size,
        "path": file.path,
    }
    if file.is_large:
        oid = MASK if masked else file.sha256
        entry["lfs"] = {"oid": oid, "size": file.size, "pointerSize": file.pointer_size}
        if repo.xet:
            entry["xetHash"] = MASK if masked else file.xet_hash
    if expand:
        entry["lastCommit"] = {"id": repo.sha, "title": "Add files", "date": CREATED_AT}
        entry["securityFileStatus"] = None
    return entry
