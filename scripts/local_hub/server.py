"""`LocalHub`: the whole loopback Hub as one context manager."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self

from scripts.local_hub.behaviours import Account, Behaviour, Route, fingerprint
from scripts.local_hub.control import Control
from scripts.local_hub.exchange import Publishers
from scripts.local_hub.hub import Hub
from scripts.local_hub.mirrors import Mirror
from scripts.local_hub.repos import Repo
from scripts.local_hub.signing import Signer
from scripts.local_hub.state import Renaming, State
from scripts.local_hub.storage import Cdn, XetStore
from scripts.local_hub.targets import find_target
from scripts.local_hub.transport import Respond, Servers, refused_address
from scripts.local_hub.wire import Answer, HubRequest, Origin, Request


class LocalHub:
    """A Hugging Face Hub on the loopback interface, with a CDN and a Xet store of their own.

    Args:
        repos: what it holds from the start; `add_repo` adds more.
        port: of the Hub; 0 takes a free one.
        cdn_port: of the CDN; 0 takes a free one.
        tls: certificate and key files; all three servers then speak https.
        link_lifetime_s: how long a signed URL and a Xet read token hold.
        page_size: entries of one page of a listing.

    Raises:
        OSError: on entering, if a port is in use.
    """

    def __init__(
        self,
        repos: Iterable[Repo] = (),
        *,
        port: int = 0,
        cdn_port: int = 0,
        tls: tuple[Path, Path] | None = None,
        link_lifetime_s: float = 900,
        page_size: int = 1000,
    ) -> None:
        self._ports: dict[Origin, int] = {"hub": port, "cdn": cdn_port, "xet": 0}
        self._tls = tls
        held = {repo.repo_id: repo for repo in repos}
        self._state = State(Signer(link_lifetime_s), held, page_size=page_size)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            held, self._state.closed_url = refused_address(secure=self._tls is not None)
            stack.callback(held.close)
            servers = Servers(
                {origin: (self._ports[origin], answer) for origin, answer in self._origins()},
                self._tls,
            )
            self._ports = servers.ports  # the same again after a restart
            self._state.urls = servers.urls
            servers.start()
            stack.callback(servers.stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def stop(self) -> None:
        """Go down: ports close, open connections break."""
        self._stack.close()

    def start(self) -> None:
        """Come up again after `stop`, on the same ports."""
        self.__enter__()

    def _origins(self) -> Iterator[tuple[Origin, Respond]]:
        hub, control = Hub(self._state), Control(self)
        answers = {
            "hub": hub.answer,
            "cdn": Cdn(self._state).answer,
            "xet": XetStore(self._state).answer,
        }

        def respond(origin: Origin, request: Request) -> tuple[Answer, HubRequest | None]:
            if origin == "hub" and request.segments[0] == "_local":
                return control.answer(request), None
            routes = {"hub": find_target(request).route, "cdn": Route.cdn, "xet": Route.cas}
            entry = self._state.record(request, origin, routes[origin])
            return answers[origin](request), entry

        for origin in self._ports:
            yield origin, partial(respond, origin)

    @property
    def url(self) -> str:
        """The Hub's address: the value for HF_ENDPOINT."""
        return self._state.urls["hub"]

    @property
    def cdn_url(self) -> str:
        """The address that weights come from."""
        return self._state.urls["cdn"]

    @property
    def log(self) -> list[HubRequest]:
        """All requests so far, in order of arrival, as copies."""
        with self._state.lock:
            return [replace(entry) for entry in self._state.log]

    def clear_log(self) -> None:
        """Forget the requests so far."""
        with self._state.lock:
            self._state.log.clear()

    def issue_token(  # noqa: PLR0913
        self,
        behaviour: Behaviour | str = Behaviour.granted,
        account: str = "alice",
        *,
        value: str | None = None,
        on: Collection[Route] | None = None,
        failures: int = 2,
        failure_status: int = 503,
        retry_after_s: int = 1,
    ) -> str:
        """Make a token known and return its value.

        Args:
            behaviour: how the Hub treats it.
            account: the user it belongs to.
            value: the token itself; default: a random one of the usual shape.
            on: limits a fault (rate limit, hang, …) to these routes.
            failures: how many answers of `flaky` fail before it is well.
            failure_status: what `flaky` (429 or 5xx) and `server_error` (5xx) answer.
            retry_after_s: what a 429 asks to wait.
        """
        token = value if value is not None else "hf_" + secrets.token_urlsafe(48)[:34]
        known = Account(
            account,
            Behaviour(behaviour),
            None if on is None else frozenset(on),
            failures,
            failure_status,
            retry_after_s,
        )
        self._state.accounts.add(token, known)
        return token

    @property
    def publishers(self) -> Publishers:
        """Whose identity tokens are exchanged, and by which clock and audience."""
        return self._state.publishers

    def set_behaviour(
        self,
        token: str | None,
        behaviour: Behaviour | str,
        *,
        repo_id: str | None = None,
        on: Collection[Route] | None = None,
        failures: int | None = None,
    ) -> None:
        """Treat a token otherwise from now on.

        Args:
            token: None stands for callers without a token; only faults can be set for them.
            behaviour: the new treatment.
            repo_id: changes it toward this repository alone.
            on: limits a fault to these routes.
            failures: how many answers of `flaky` fail from now on; None leaves the count.

        Raises:
            KeyError: the token is unknown; the message names its fingerprint.
        """
        account = self._state.accounts.find(token)
        if account is None:
            raise KeyError(fingerprint(token or ""))
        self._state.accounts.change(
            account, Behaviour(behaviour), repo_id=repo_id, on=on, failures=failures
        )

    def set_outage(self, fault: Behaviour | str | None) -> None:
        """Let one fault strike every request to the Hub, whoever asks; None ends it."""
        self._state.outage = None if fault is None else Behaviour(fault)

    def send_chunks_from(self, url: str) -> None:
        """Let the Xet store's plans name another place for the bytes; "" is the CDN again."""
        self._state.chunks_url = url

    def drop_headers(self, *names: str) -> None:
        """Leave headers out of the Hub's answers, as a mirror may; without a name all are sent."""
        self._state.dropped_headers = frozenset(name.lower() for name in names)

    def answer_as(self, mirror: Mirror | None) -> None:
        """Let a mirror answer in the Hub's place from now on; None is the Hub again."""
        self._state.mirror = mirror

    @property
    def closed_url(self) -> str:
        """An address where nobody listens."""
        return self._state.closed_url

    def add_repo(self, repo: Repo) -> None:
        """Hold one more repository, or another one under the same name."""
        self._state.repos[repo.repo_id] = repo

    def remove_repo(self, repo_id: str) -> None:
        """Delete a repository."""
        del self._state.repos[repo_id]

    def commits(self) -> dict[str, dict[str, str]]:
        """Return the commit of every branch and tag, by repository."""
        return {name: dict(repo.refs) for name, repo in self._state.repos.items()}

    def knows(self, token: str) -> bool:
        """Return whether a value is a token of this Hub, whatever its behaviour."""
        return self._state.accounts.knows(token)

    def rename(self, old: str, new: str, *, origin: str = "") -> None:
        """Redirect (307) a repository's routes to its new name.

        Args:
            old: the name that moves; a repository held under it moves along.
            new: the name it gets.
            origin: sends the client to another origin, which the real Hub does not.
        """
        repo = self._state.repos.pop(old, None)
        if repo is not None:
            repo.repo_id = new
            self._state.repos[new] = repo
        self._state.renamed[old] = Renaming(new, origin)
