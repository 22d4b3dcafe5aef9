"""One sentence for each outcome of a source without commits: what to do about it."""

from __future__ import annotations

from serve_app.access.verdict import Outcome

_WORDS: dict[Outcome, str] = {
    Outcome.GRANTED: "Nothing to do.",
    Outcome.NO_TOKEN: (
        "Give this node credentials that may read {url}: {chain}; in the environment of the "
        "replicas, before Ray starts."
    ),
    Outcome.MALFORMED_TOKEN: (
        "Correct the credentials of this node as the message says; they are looked for in: {chain}."
    ),
    Outcome.INVALID_TOKEN: (
        "The store does not know these credentials ({source}): replace them on this node, and see "
        "that they are those of {endpoint}."
    ),
    Outcome.EXPIRED_TOKEN: (
        "These credentials have ended ({source}): log in again, or let a role of this node renew "
        "them."
    ),
    Outcome.IDENTITY_REFUSED: (
        "The identity of this node is not taken for the role ({source}): compare the role's trust "
        "policy with it."
    ),
    Outcome.TOKEN_SCOPE: "Let the credentials of this node ({source}) read {url}: {rights}.",
    Outcome.CONTENT_BLOCKED: (
        "The site refuses and does not tell apart why: see that the token of this node ({source}) "
        "belongs to an account that may read {url}, accept its terms there if it has some, and "
        "check the name."
    ),
    Outcome.LICENSE_NOT_ALLOWED: (
        "Let whoever decides about licenses read it; then add it to access.license, or choose "
        "another model."
    ),
    Outcome.SIGNATURE_INVALID: (
        "Put the files there as the signer signed them, model.sig beside them, or correct "
        "access.signature; serve nothing that nobody vouches for."
    ),
    Outcome.REPO_NOT_FOUND: "Check model.url: {url} names nothing at {endpoint}.",
    Outcome.REPO_DISABLED: "The account that {url} belongs to is disabled: see to it there.",
    Outcome.DIGEST_MISMATCH: (
        "Find out who changed what lies at {url}; then deploy again, which pins what is there now."
    ),
    Outcome.WEIGHTS_MISSING: "Put the complete model under {url}, with config.json at its top.",
    Outcome.WEIGHTS_UNREACHABLE: (
        "The store lists the files and does not send them: see to what stands before {endpoint}, "
        "and that they are in no archive class."
    ),
    Outcome.RATE_LIMITED: "{endpoint} is at its limit: wait a few minutes and check again.",
    Outcome.HUB_UNREACHABLE: (
        "Let this node reach {endpoint} (network, DNS, proxy, TLS), or set access.endpoint."
    ),
    Outcome.UNKNOWN: (
        "Nothing that {endpoint} said proves that {url} can be read here: see that it is what "
        "model.url says, and check again."
    ),
}


_CHAIN = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, ~/.aws/credentials, or a role",
    "modelscope": "MODELSCOPE_API_TOKEN, or a file that access.token_file names",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, the node's or pod's service account, or gcloud's login",
}
_RIGHTS = {
    "s3": "s3:ListBucket on the bucket, s3:GetObject on its objects, and kms:Decrypt for the key "
    "that encrypts them, if there is one",
    "modelscope": "an account that may read it",
    "gs": "storage.objects.list and storage.objects.get (roles/storage.objectViewer) on the bucket",
}


def remedy_at(outcome: Outcome, *, url: str, source: str, endpoint: str) -> str:
    """Return the sentence that says what to do.

    Args:
        outcome: of the proof.
        url: `model.url`.
        source: of the credentials.
        endpoint: who was asked.
    """
    scheme = url.partition("://")[0]
    words = {"chain": _CHAIN[scheme], "rights": _RIGHTS[scheme]}
    return _WORDS[outcome].format(url=url, source=source, endpoint=endpoint, **words)
