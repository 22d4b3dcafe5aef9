"""The probe: can this process, with its token, read the weights of this repo at this commit?

Asks the Hub directly with own limits, never through the cache (which hides a lost grant),
never by metadata alone (which is public) and never by README or LICENSE (which are open to
all). What proves access is the beginning of a weights file, or the storage's own answer about
it. Everything else is a refusal or a "don't know", and both block.

The token's value is put into a header here, and in `download.py`, for the Hub's own origin alone.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace

import httpx2
import huggingface_hub
from huggingface_hub import constants, is_offline_mode

from serve_app import __version__
from serve_app.access import local
from serve_app.access.hub.bounded_client import origin
from serve_app.access.hub.classify import Answer, Caller, Step, classify
from serve_app.access.hub.client import Failed, Wire
from serve_app.access.hub.steps import JSON_BYTES, Proof
from serve_app.access.hub.subject import Subject
from serve_app.access.identity import forget
from serve_app.access.limited import within
from serve_app.access.remedies import remedy
from serve_app.access.sources.probe import SourceProbe
from serve_app.access.terms import Terms
from serve_app.access.token import ResolvedToken, resolve_token
from serve_app.access.verdict import CommitFacts, NodeVerdict, Outcome, TokenReport
from serve_app.checkpoint.runnable import Loader
from serve_app.config import AccessConfig, ModelConfig
from serve_app.endpoint import check_endpoint, is_plain_http
from serve_app.redaction import sanitise

PLAIN_HTTP = "the Hub's URL is plain http, which would send the token in clear text"
PLAIN_HTTP_REMEDY = (
    "Use an https:// URL (access.endpoint or HF_ENDPOINT), set access.allow_http: true if the "
    "network to it is trusted, or give this node no token if the mirror needs none."
)
MESSAGE_CHARS = 900  # the claims of an identity, and what the Hub said to them
BUDGET_SHARE = 2 / 3  # of the gate's deadline; the rest is for starting and collecting probes
# Own words instead of huggingface_hub's `build_hf_headers`, which may ask the Hub for a list of
# known agents first: a request that nobody counts, three seconds where the Hub hangs.
USER_AGENT = f"serve-app/{__version__}; hf_hub/{huggingface_hub.__version__}"
DEAD = frozenset({Outcome.INVALID_TOKEN, Outcome.EXPIRED_TOKEN})
# Refusals that a look at the account explains: whose grant is it, is the token alive at all?
EXPLAINED = frozenset(
    {
        Outcome.INVALID_TOKEN,
        Outcome.LICENSE_NOT_ACCEPTED,
        Outcome.REQUEST_PENDING,
        Outcome.REQUEST_REJECTED,
        Outcome.REQUEST_RESET,
        Outcome.TOKEN_SCOPE,
        Outcome.ORG_POLICY,
        Outcome.CONTENT_BLOCKED,
        Outcome.REPO_NOT_FOUND,
    }
)


def check_here(
    model: ModelConfig,
    access: AccessConfig,
    *,
    commit: str | None = None,
    hint: NodeVerdict | None = None,
    loader: Loader | None = None,
) -> NodeVerdict:
    """Prove, or fail to prove, that this process can read the weights.

    Blocks for at most two thirds of `access.deadline_s`, whatever the network does, or a mount;
    but for reading a directory's every byte, where a digest or a signature wants that.

    Args:
        model: what is to be read; a local `path` is checked for completeness instead, and a `url`
            is proven as `access/sources/` does it.
        access: which token, which Hub, which limits.
        commit: probe this commit, 40 hex digits, instead of what `model.revision` means now;
            its index counts as proven by whoever pinned it.
        hint: what another node learned about the same commit: the file to look at, and whose
            token it is if this node uses the same. Saves requests, decides nothing.
        loader: what will load them, so that what it cannot load is refused; None asks for
            access alone.

    Returns:
        The verdict of this node, named by its host name; never raises.
    """
    limit_s = max(1.0, access.deadline_s * BUDGET_SHARE)
    if model.path is not None:
        verdict = local.check_model(model.path, Terms.of(model, access), loader, limit_s)
    elif model.url is not None:
        asked = SourceProbe(model, access, commit=commit, hint=hint, loader=loader)
        verdict = asked.bounded(limit_s)
    else:
        probe = Probe(model, access, commit=commit, hint=hint, loader=loader)
        verdict = probe.bounded(limit_s)
    return replace(verdict, node_name=socket.gethostname())


def endpoint_of(access: AccessConfig) -> str:
    """Return the Hub's URL: the config's, or what huggingface_hub uses in this process."""
    return access.endpoint or constants.ENDPOINT


class Probe:
    """One check of one repository.

    Args:
        model: what is to be read, on the Hub.
        access: which token, which Hub, which limits.
        commit: the pinned commit, if there is one.
        hint: see `check_here`.
        loader: see `check_here`.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        model: ModelConfig,
        access: AccessConfig,
        *,
        commit: str | None = None,
        hint: NodeVerdict | None = None,
        loader: Loader | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._model = model
        self._access = access
        self._pinned = commit
        self._hint = hint
        self._loader = loader
        self._transport = transport
        self._repo_id = str(model.repo_id)
        self._endpoint = endpoint_of(access)
        self._resolved = ResolvedToken(None, TokenReport("unresolved"))
        self._wire: Wire | None = None
        self._proof: Proof | None = None

    def bounded(self, budget_s: float) -> NodeVerdict:
        """Run in a thread that is left behind if it overruns: name resolution has no limit."""
        # A little longer than its own limits: what it found has better words than these.
        if verdict := within(budget_s + 0.5, lambda: self.run(budget_s)):
            return verdict
        step = self._wire.step if self._wire else "token"
        message = f"no answer to the question for the {step} within {budget_s:g} s"
        return self._verdict(Failed(Outcome.HUB_UNREACHABLE, message))

    def run(self, budget_s: float) -> NodeVerdict:
        """Probe; never raises."""
        try:
            return self._run(budget_s)
        except Failed as failed:
            return self._verdict(failed)
        except Exception as error:  # noqa: BLE001 (unknown is no, and its text may hold a header)
            message = f"the probe itself failed ({type(error).__name__})"
            return self._verdict(Failed(Outcome.UNKNOWN, message))
        finally:
            if self._wire is not None:
                self._wire.close()

    def _run(self, budget_s: float) -> NodeVerdict:
        self._resolved = resolve_token(self._access)
        if self._resolved.fault is not None:
            fault = self._resolved.fault
            raise Failed(fault.outcome, fault.message, status=fault.status, remedy=fault.remedy)
        self._refuse_endpoint()
        self._wire = wire = Wire(
            self._endpoint,
            self._credentials,
            timeout_s=self._access.timeout_s,
            budget_s=budget_s,
            transport=self._transport,
        )
        # Facts are of one commit: without a pin the revision may mean another one here.
        hint = self._hint if self._pinned else None
        subject = Subject(
            self._endpoint,
            self._repo_id,
            self._model.revision,
            self._pinned,
            hint.weights_file if hint else None,
            has_token=self._resolved.token is not None,
            loader=self._loader,
            weights_bytes=hint.weights_bytes if hint else None,
            terms=Terms.of(self._model, self._access),
            facts=hint.facts if hint else None,
            spent_requests=self._resolved.requests,
        )
        self._proof = Proof(subject, wire)
        try:
            self._proof.run()
        except Failed as failed:
            found = self._explain(wire, failed)
            if self._resolved.token is not None and found.outcome in DEAD:
                forget(self._resolved.token.reveal())  # one by exchange may be revoked early
            return self._verdict(found)
        return self._verdict(Failed(Outcome.GRANTED, ""))

    def _refuse_endpoint(self) -> None:
        try:
            self._endpoint = check_endpoint(self._endpoint)
        except ValueError as error:
            message = f"HF_ENDPOINT {error}"
            remedy = "Correct HF_ENDPOINT on this node, or set access.endpoint."
            raise Failed(Outcome.HUB_UNREACHABLE, message, remedy=remedy) from None
        has_token = self._resolved.token is not None
        if is_plain_http(self._endpoint) and has_token and not self._access.allow_http:
            raise Failed(Outcome.HUB_UNREACHABLE, PLAIN_HTTP, remedy=PLAIN_HTTP_REMEDY)
        if is_offline_mode():
            raise Failed(
                Outcome.HUB_UNREACHABLE,
                "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set here, so nothing can be proven",
            )

    def _credentials(self, url: str) -> Mapping[str, str]:
        headers = {"user-agent": USER_AGENT}
        token = self._resolved.token
        # Asked for each request: a redirect may have left the Hub.
        if token is not None and origin(url) == origin(self._endpoint):
            headers["authorization"] = f"Bearer {token.reveal()}"
        return headers

    def _explain(self, wire: Wire, failed: Failed) -> Failed:
        """Ask whose token it is; the Hub answers an unknown token like none at all."""
        if self._resolved.token is None or failed.outcome not in EXPLAINED:
            return failed
        hint = self._hint
        if hint is not None and _explains(hint, failed, self._resolved.report):
            self._name_account(hint.token.account)
            return Failed(hint.outcome, hint.hub_message or failed.message, status=failed.status)
        try:
            url = f"{self._endpoint}/api/whoami-v2"
            # Once: the route is strictly limited, and the verdict does not depend on it.
            answer = wire.ask(Step.WHOAMI, "GET", url, limit=JSON_BYTES, tries=1)
        except Failed:
            return failed
        payload = answer.payload() if answer.is_ok else None
        name = payload.get("name") if isinstance(payload, dict) else None
        if isinstance(name, str):
            self._name_account(sanitise(name, limit=100))
        if failed.outcome is Outcome.INVALID_TOKEN:
            return _doubted(failed, answer, is_known=isinstance(name, str))
        return failed

    def _name_account(self, name: str | None) -> None:
        report = replace(self._resolved.report, account=name)
        self._resolved = replace(self._resolved, report=report)

    def _verdict(self, end: Failed) -> NodeVerdict:
        mirror = self._proof.mirror if self._proof else None
        sentence, url = remedy(
            end.outcome,
            repo_id=self._repo_id,
            revision=self._model.revision,
            endpoint=self._endpoint,
            token=self._resolved.report,
            host=end.host,
            mirror=mirror,
        )
        message = end.message
        # A Hub that repeats what it was sent must not put a token into a table.
        if self._resolved.token is not None:
            message = message.replace(self._resolved.token.reveal(), "[secret]")
        return NodeVerdict(
            node_id="",
            node_name="",
            outcome=end.outcome,
            remedy=end.remedy or sentence,
            http_status=end.status,
            hub_message=sanitise(message, limit=MESSAGE_CHARS) or None,
            url=url,
            token=self._resolved.report,
            hub_requests=self._resolved.requests + (self._wire.requests if self._wire else 0),
            commit=self._proof.commit if self._proof else self._pinned,
            weights_file=self._proof.weights_file if self._proof else None,
            weights_bytes=self._proof.weights_bytes if self._proof else None,
            facts=self._proof.facts if self._proof else CommitFacts(),
            mirror=mirror,
        )


def _explains(hint: NodeVerdict, failed: Failed, report: TokenReport) -> bool:
    """Return whether another node has asked about the same refusal of the same token."""
    if hint.token.fingerprint != report.fingerprint:
        return False
    expired = (Outcome.EXPIRED_TOKEN, Outcome.INVALID_TOKEN)
    return hint.outcome is failed.outcome or (hint.outcome, failed.outcome) == expired


def _doubted(failed: Failed, account: Answer, *, is_known: bool) -> Failed:
    """Say what a token is that was refused as unknown, by what the account route says of it."""
    if is_known:
        message = f"refused like an unknown token, but the token is known: {failed.message}"
        return Failed(Outcome.UNKNOWN, message, status=failed.status)
    if classify(account, Caller(has_token=True)) is Outcome.EXPIRED_TOKEN:
        return Failed(Outcome.EXPIRED_TOKEN, account.words, status=account.status)
    return failed
