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
    Outcome.SIGNATURE_INVALID: (
        "Take a revision that the signer signed as it is (`model_signing sign`), or correct "
        "access.signature; serve nothing that nobody vouches for.",
        "/{repo_id}/tree/{revision}",
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

_ACCOUNT = (
    "{mirror} asks the Hub with an account of its own, the same for all nodes, and that one is "
    "refused: let whoever runs {mirror} get it the access, or give it another token."
)
# Where a mirror answers instead of the Hub. No links: its pages are not the Hub's.
_AT_MIRROR: dict[Outcome, str] = {
    Outcome.NO_TOKEN: (
        "Give this node a token of {mirror}, not of the Hub: in HF_TOKEN before Ray starts, or in "
        "a file that access.token_file names."
    ),
    Outcome.INVALID_TOKEN: (
        "{mirror} does not know this token: replace the one at {source} by one that {mirror} "
        "issued, not the Hub."
    ),
    Outcome.EXPIRED_TOKEN: "Let {mirror} issue a new token, and replace the one at {source}.",
    Outcome.LICENSE_NOT_ACCEPTED: _ACCOUNT,
    Outcome.REQUEST_PENDING: _ACCOUNT,
    Outcome.REQUEST_REJECTED: _ACCOUNT,
    Outcome.REQUEST_RESET: _ACCOUNT,
    Outcome.TOKEN_SCOPE: _ACCOUNT,
    Outcome.ORG_POLICY: _ACCOUNT,
    Outcome.CONTENT_BLOCKED: (
        "{mirror} refuses and does not tell apart whether the rights of this token there are "
        "missing or the access of its own account on the Hub: ask whoever runs it."
    ),
    Outcome.UNKNOWN: (
        "{mirror} does not prove here what the Hub does, and what is not proven blocks: ask "
        "whoever runs it for what is missing above, or set another access.endpoint."
    ),
}


def remedy(  # noqa: PLR0913 (the words of a sentence)
    outcome: Outcome,
    *,
    repo_id: str = "",
    revision: str = "main",
    endpoint: str = "",
    token: TokenReport = TokenReport(),  # noqa: B008 (frozen)
    host: str | None = None,
    mirror: str | None = None,
) -> tuple[str, str | None]:
    """Return the sentence that says what to do and the link for an outcome."""
    sentence, path = _MENDS[outcome]
    if mirror is not None:
        sentence, path = _AT_MIRROR.get(outcome, sentence), None
    words = {
        "repo_id": repo_id,
        "endpoint": endpoint,
        "source": token.source,
        "account": token.account or "the account of this token",
        "mirror": mirror,
        "host": host or "the storage hosts of the Hub",
    }
    page = None
    if path is not None:
        page = endpoint + path.format(repo_id=repo_id, revision=quote(revision, safe=""))
    said = sentence.format(**words)
    return said[:1].upper() + said[1:], page
