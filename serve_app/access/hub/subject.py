"""What a probe is to read, and what the Hub says of the file that it looks at. Plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from serve_app.access.hub.classify import Answer
from serve_app.access.terms import Terms
from serve_app.access.verdict import CommitFacts
from serve_app.checkpoint.runnable import Loader


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to be read, and who asks.

    Args:
        endpoint: the Hub, without a trailing slash.
        repo_id: the repository.
        revision: branch, tag or commit.
        pinned: the commit that the revision was resolved to before, whose index counts as
            proven; None resolves it.
        weights_file: the file of the pinned commit to look at, if it is known.
        has_token: whether the requests carry a token.
        loader: what will load the files; None asks for access alone.
        weights_bytes: of all its weights in memory, if that is known.
        terms: what the config wants of the commit besides access.
        facts: what another node learned of the pinned commit.
        spent_requests: to the Hub, for the token: another one is saved for it.
    """

    endpoint: str
    repo_id: str
    revision: str
    pinned: str | None
    weights_file: str | None
    has_token: bool
    loader: Loader | None = None
    weights_bytes: int | None = None
    terms: Terms = field(default_factory=Terms)
    facts: CommitFacts | None = None
    spent_requests: int = 0

    @property
    def wants_sizes(self) -> bool:
        """Return whether sizes have to come with the description, and the index need not."""
        wanted = self.terms.wants_text or self.spent_requests
        return bool(wanted) and not self.terms.wants_files


@dataclass(frozen=True, slots=True)
class Weights:
    """What the Hub says about one file of weights; `xet_hash` if it lies in the chunk store."""

    answer: Answer
    name: str
    size: int | None
    xet_hash: str | None
