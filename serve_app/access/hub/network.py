"""The way to a host: proxies and certificates of this process's environment, and its faults.

The client takes both from the environment as huggingface_hub's own does. What it says when one
of them is wrong names neither the variable nor the host, so that is found out here.
"""

from __future__ import annotations

import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import httpx2

from serve_app.redaction import sanitise

CA_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # that the client reads, in its order
# Those that other clients read, and people set.
OTHER_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class NoClient(Exception):
    """No client can be made in this environment; says what is wrong and what to do."""

    def __init__(self, fault: NetworkFault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class NetworkFault:
    """Why no answer came, and what to do about it.

    Args:
        message: names the host, and the proxy and its variable where one is used.
        remedy: a sentence; None where the outcome's own fits.
    """

    message: str
    remedy: str | None = None


@dataclass(frozen=True, slots=True)
class Proxy:
    """A proxy of the environment.

    Args:
        variable: that names it.
        host: with the port, without credentials.
    """

    variable: str
    host: str


def open_client(transport: httpx2.BaseTransport | None = None) -> httpx2.Client:
    """Return a client that follows no redirects by itself.

    Args:
        transport: replaces the network in tests.

    Raises:
        NoClient: a variable of the environment names a proxy or a certificate that cannot be.
    """
    fault = _missing_certificates()
    # Before the client is made, which would say that some file was not found.
    if fault is not None and transport is None:
        raise NoClient(fault)
    try:
        return httpx2.Client(transport=transport, follow_redirects=False)
    except ImportError:
        raise NoClient(_socks()) from None
    except (httpx2.InvalidURL, ValueError) as error:
        named = " or ".join(_set_proxies()) or "the proxy variables"
        message = sanitise(f"{named} names no proxy that can be used: {error}")
        remedy = f"Write the proxy on this node as http://host:port ({named})."
        raise NoClient(NetworkFault(message, remedy)) from None
    except OSError as error:
        message = sanitise(f"the certificates of this machine cannot be read: {error.strerror}")
        raise NoClient(NetworkFault(message, _CA_REMEDY)) from None


def fault_of(error: Exception, url: str, timeout_s: float) -> NetworkFault:
    """Say why a request brought no answer; never quotes the URL, which may hold a signature."""
    host, proxy = host_of(url), proxy_for(url)
    through = f" through the proxy {proxy.host} ({proxy.variable})" if proxy else ""
    if isinstance(error, httpx2.TimeoutException):
        return NetworkFault(
            f"{host} did not answer within {timeout_s:g} s{through}", _detour(proxy, host)
        )
    if is_certificate(error):
        message = sanitise(f"the TLS certificate of {host} is not trusted here: {_last(error)}")
        return NetworkFault(message, _ca_remedy(host))
    if isinstance(error, httpx2.ProxyError):
        named = f"the proxy {proxy.host} ({proxy.variable})" if proxy else "the proxy"
        message = sanitise(f"{named} on the way to {host} refused: {error}")
        return NetworkFault(message, _detour(proxy, host))
    if isinstance(error, httpx2.NetworkError | OSError):
        message = sanitise(f"no connection to {host}{through}: {error}")
        return NetworkFault(message, _detour(proxy, host))
    if isinstance(error, httpx2.RemoteProtocolError | httpx2.DecodingError):
        return NetworkFault(f"what {host} answered is not HTTP, or broke off{through}")
    return NetworkFault(f"{host} could not be asked ({type(error).__name__})")


def proxy_for(url: str) -> Proxy | None:
    """Return the proxy that this process's environment puts on the way to a URL."""
    parts = urlsplit(url)
    # As the standard library reads NO_PROXY, and so the client's own.
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    for name in (f"{parts.scheme}_proxy", "all_proxy"):
        for variable in (name, name.upper()):
            if value := os.environ.get(variable, "").strip():
                return Proxy(variable, host_of(value if "://" in value else f"http://{value}"))
    return None


def host_of(url: str) -> str:
    """Return host and port of a URL, without credentials."""
    return urlsplit(url).netloc.rpartition("@")[2]


def is_certificate(error: BaseException | None) -> bool:
    """Return whether a certificate that is not trusted is behind an error."""
    if error is None:
        return False
    if isinstance(error, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY" in str(error):
        return True
    # Each layer of the client wraps it in an exception of its own.
    return is_certificate(error.__cause__ or error.__context__)


def _last(error: BaseException) -> str:
    return str(error).rpartition("] ")[2] or str(error)


def _missing_certificates() -> NetworkFault | None:
    for variable in CA_VARIABLES:
        value = os.environ.get(variable)
        if not value:
            continue
        try:
            usable = Path(value).is_file() if variable == "SSL_CERT_FILE" else Path(value).is_dir()
        except (OSError, ValueError):
            usable = False
        if usable:
            return None
        message = sanitise(f"{variable} names {value}, which is not there")
        return NetworkFault(message, f"Correct {variable} on this node, or unset it.")
    return None


def _socks() -> NetworkFault:
    named = [name for name in _set_proxies() if os.environ[name].startswith("socks")]
    shown = ", ".join(f"{name} ({host_of(os.environ[name])})" for name in named) or "a proxy"
    message = sanitise(f"{shown} is a SOCKS proxy, for which a package is missing here")
    return NetworkFault(
        message, "`pip install 'httpx2[socks]'` on this node, or set an http proxy."
    )


def _set_proxies() -> list[str]:
    names = [f"{scheme}_proxy" for scheme in ("https", "http", "all")]
    return [name for name in os.environ if name.lower() in names and os.environ[name]]


_CA_REMEDY = "Name a readable file of certificates in SSL_CERT_FILE on this node."


def _ca_remedy(host: str) -> str:
    for variable in OTHER_CA_VARIABLES:
        value = os.environ.get(variable)
        if value and not os.environ.get("SSL_CERT_FILE"):
            return sanitise(
                f"{variable} is set, but this client reads SSL_CERT_FILE: set "
                f"SSL_CERT_FILE={value} on this node."
            )
    if os.environ.get("SSL_CERT_FILE"):
        return (
            f"Add the authority that signed the certificate of {host} to the file of SSL_CERT_FILE."
        )
    return (
        f"Set SSL_CERT_FILE on this node to a file with the authority that signed the certificate "
        f"of {host} (a proxy that inspects TLS has one of its own)."
    )


def _detour(proxy: Proxy | None, host: str) -> str | None:
    if proxy is None:
        return None
    return (
        f"Correct {proxy.variable} on this node, let its proxy {proxy.host} reach {host}, or add "
        f"{host.partition(':')[0]} to NO_PROXY."
    )
