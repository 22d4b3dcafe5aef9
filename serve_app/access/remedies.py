"""One sentence per outcome that names the fix, and the one link that helps."""

from __future__ import annotations

from urllib.parse import quote

from serve_app.access.verdict import Outcome, TokenReport

# Outcome -> (sentence, path of the link on the Hub or None).
_MENDS: dict[Outcome, tuple[str, str | None]] = {
    Outcome.GRANTED: ("Nothing to do.", None),
    Outcome.NO_TOKEN: (
        "Give this node a token: set HF_TOKEN in its environment before Ray starts, or put the "
        "token into a file on the node and name it in access.token_file.",
        "/settings/tokens",
    ),
    Outcome.MALFORMED_TOKEN: (
        "Put the bare token, one line without quotes, where it is taken from ({source}).",
        None,
    ),
    Outcome.INVALID_TOKEN: (
        "The Hub does not know this token (mistyped or revoked): create a new one and replace it "
        "at {source}.",
        "/settings/tokens",
    ),
    Outcome.EXPIRED_TOKEN: (
        "The token has expired: create a new one and replace it at {source}.",
        "/settings/tokens",
    ),
    Outcome.IDENTITY_REFUSED: (
        "Compare these claims with the Trusted Publisher on the Hub (issuer and claims have to be "
        "the same to the letter), the audience and the clock of who issues it ({source}).",
        "/settings/tokens",
    ),
    Outcome.LICENSE_NOT_ACCEPTED: (
        "Log in as {account}, open the link, accept the license or ask for access, and check "
        "again.",
        "/{repo_id}",
    ),
    Outcome.REQUEST_PENDING: (
        "The request of {account} waits for a review by the owners of {repo_id}: wait for their "
        "mail, or use the token of an account that has access.",
        "/settings/gated-repos",
    ),
    Outcome.REQUEST_REJECTED: (
        "The owners of {repo_id} rejected the request of {account}, which cannot ask again: use "
        "the token of an account that has access.",
        "/{repo_id}",
    ),
    Outcome.REQUEST_RESET: (
        "The owners of {repo_id} reset the access: log in as {account}, open the link and ask "
        "again.",
        "/{repo_id}",
    ),
    Outcome.TOKEN_SCOPE: (
        "Edit the fine-grained token of {account}: allow `read access to contents of all public "
        "gated repos you can access`, or use a token of type read.",
        "/settings/tokens",
    ),
    Outcome.ORG_POLICY: (
        "An organization's token policy refuses this token: let an administrator approve it, or "
        "use a token that the policy allows.",
        "/settings/tokens",
    ),
    Outcome.CONTENT_BLOCKED: (
        "The content is refused for another reason than the license, in the words above: fix "
        "that (country, network or content policy, single sign-on), or ask the repo's owners.",
        "/{repo_id}",
    ),
    Outcome.LICENSE_NOT_ALLOWED: (
        "Let whoever decides about licenses read it; then add it to access.license, or choose "
        "another model or revision.",
        "/{repo_id}",
    ),
    Outcome.DIGEST_MISMATCH: (
        "Find out who changed the files; then set model.digest to what `serve-app digest` prints, "
        "or model.revision to the commit that the digest belongs to.",
        "/{repo_id}/commits/{revision}",
    ),
    Outcome.REPO_NOT_FOUND: (
        "Check model.repo_id; if the repository is private, this node needs the token of an "
        "account that may see it.",
        "/{repo_id}",
    ),
    Outcome.REVISION_NOT_FOUND: (
        "Check model.revision: {repo_id} has no branch, tag or commit of that name.",
        "/{repo_id}/tree/main",
    ),
    Outcome.REPO_DISABLED: (
        "The Hub has disabled {repo_id}: choose another repository.",
        "/{repo_id}",
    ),
    Outcome.WEIGHTS_MISSING: (
        "Choose a revision that holds complete safetensors weights: model.safetensors, or an index "
        "and every shard in it.",
        "/{repo_id}/tree/{revision}",
    ),
    Outcome.WEIGHTS_UNREACHABLE: (
        "The Hub says yes but the bytes do not come: let this node reach {host} (firewall, proxy, "
        "TLS inspection, DNS).",
        None,
    ),
    Outcome.RATE_LIMITED: (
        "Too many requests from this token or address: wait a few minutes and check again.",
        None,
    ),
    Outcome.HUB_UNREACHABLE: (
        "Let this node reach {endpoint} (network, DNS, proxy, TLS; is the Hub up?), or set "
        "access.endpoint.",
        None,
    ),
    Outcome.PROBE_FAILED: (
        "See to this node: it was lost or did not answer in time; then check again.",
        None,
    ),
    Outcome.UNKNOWN: (
        "The answer is not one that a Hub gives: check that {endpoint} is one, and check again.",
        None,
    ),
}


def remedy(
    outcome: Outcome,
    *,
    repo_id: str = "",
    revision: str = "main",
    endpoint: str = "",
    token: TokenReport = TokenReport(),  # noqa: B008 (frozen)
    host: str | None = None,
) -> tuple[str, str | None]:
    """Return the sentence that says what to do and the link for an outcome."""
    sentence, path = _MENDS[outcome]
    words = {
        "repo_id": repo_id,
        "endpoint": endpoint,
        "source": token.source,
        "account": token.account or "the account of this token",
        "host": host or "the storage hosts of the Hub",
    }
    page = None
    if path is not None:
        page = endpoint + path.format(repo_id=repo_id, revision=quote(revision, safe=""))
    return sentence.format(**words), page
