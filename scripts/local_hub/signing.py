"""Short-lived permissions: signed URLs for the CDN, read tokens for the Xet store.

Both are stateless: what is allowed, for whom and until when stands in the clear, followed by
an HMAC under a key that lives as long as the Hub.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from urllib.parse import urlencode


class Signer:
    """Signs and checks permissions.

    Args:
        lifetime_s: how long a permission holds.
    """

    def __init__(self, lifetime_s: float) -> None:
        self._key = secrets.token_bytes(32)
        self.lifetime_s = lifetime_s

    def _mark(self, *parts: str) -> str:
        return hmac.new(self._key, "\0".join(parts).encode(), hashlib.sha256).hexdigest()

    def query(self, path: str, account_key: str) -> str:
        """Return the query that opens `path` at the CDN."""
        expires = str(int(time.time() + self.lifetime_s))
        signature = self._mark("cdn", path, account_key, expires)
        return urlencode({"Expires": expires, "Key-Pair-Id": account_key, "Signature": signature})

    def opens(self, path: str, query: dict[str, list[str]]) -> str | None:
        """Return the account key a signed URL was made for; None if it does not open `path`."""
        expires, account_key, signature = (
            query.get(name, [""])[-1] for name in ("Expires", "Key-Pair-Id", "Signature")
        )
        good = hmac.compare_digest(signature, self._mark("cdn", path, account_key, expires))
        return account_key if good and int(expires) > time.time() else None

    def token(self, repo_id: str, account_key: str) -> tuple[str, int]:
        """Return a read token of the Xet store for one repository and its expiry (Unix time)."""
        expires = int(time.time() + self.lifetime_s)
        claim = f"{repo_id}:{account_key}:{expires}"
        return f"xet:{claim}:{self._mark('xet', claim)}", expires

    def admits(self, token: str | None) -> tuple[str, str] | None:
        """Return (repo_id, account key) of a valid read token of the Xet store, else None."""
        parts = (token or "").split(":")
        if len(parts) != 5 or parts[0] != "xet":
            return None
        _, repo_id, account_key, expires, mark = parts
        claim = f"{repo_id}:{account_key}:{expires}"
        if not hmac.compare_digest(mark, self._mark("xet", claim)):
            return None
        return (repo_id, account_key) if int(expires) > time.time() else None
