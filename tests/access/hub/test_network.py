"""Proxies and certificates of the environment: what is wrong is named by variable and host."""

import socket
import threading

import httpx2
import pytest
from huggingface_hub import constants

from scripts.local_hub import LocalHub, Repo
from serve_app.access.hub import network
from serve_app.access.hub.network import fault_of, host_of, proxy_for
from serve_app.access.hub.probe import check_here
from serve_app.access.verdict import Outcome
from serve_app.config import AccessConfig
from serve_app.errors import ModelLoadError
from serve_app.weights.fetch import fetch
from tests.access.cases import COMMIT, MODEL, access, single_files
from tests.conftest import TINY_REPO

HUB = "https://hub.example"
LIMITS = {"timeout_s": 1, "deadline_s": 4}
PROXIES = [
    f"{name}{suffix}" for name in ("http", "https", "all", "no") for suffix in ("_proxy", "_PROXY")
]
PROXIES += [name.upper() for name in PROXIES]


@pytest.fixture(autouse=True)
def no_surroundings(monkeypatch, tmp_path):
    for name in (*PROXIES, *network.CA_VARIABLES, *network.OTHER_CA_VARIABLES, "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def asked(url=HUB):
    verdict = check_here(MODEL, AccessConfig(endpoint=url, **LIMITS))
    assert verdict.outcome is Outcome.HUB_UNREACHABLE
    return verdict


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
def test_fault_names_a_proxy_that_cannot_be_found(monkeypatch, variable):
    """Not the Hub, which nobody asked; and never its password."""
    monkeypatch.setenv(variable, "http://user:secret@nosuchproxy.invalid:3128")
    verdict = asked()
    for words in (verdict.hub_message, verdict.remedy):
        assert "nosuchproxy.invalid:3128" in words
        assert variable in words
        assert "secret" not in words
    assert "hub.example" in verdict.remedy
    assert "NO_PROXY" in verdict.remedy


def test_fault_names_a_proxy_that_refuses(monkeypatch):
    """With what it says."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                connection.close()

        threading.Thread(target=refuse, daemon=True).start()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("HTTPS_PROXY", f"http://{place}")
        verdict = asked()
        assert f"the proxy {place} (HTTPS_PROXY)" in verdict.hub_message
        assert "407" in verdict.hub_message
        assert "HTTPS_PROXY" in verdict.remedy


@pytest.mark.parametrize("scheme", ["socks5", "socks5h"])
def test_fault_names_the_package_that_a_socks_proxy_needs(monkeypatch, scheme):
    """With the package to install; not as a failure of the probe."""
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://user:secret@127.0.0.1:1080")
    verdict = asked()
    assert "ALL_PROXY (127.0.0.1:1080) is a SOCKS proxy" in verdict.hub_message
    assert "pip install 'httpx2[socks]'" in verdict.remedy
    assert "secret" not in verdict.hub_message


def test_fault_names_a_proxy_of_an_unknown_kind(monkeypatch):
    """A mistyped scheme."""
    monkeypatch.setenv("HTTPS_PROXY", "ftp://proxy:21")
    verdict = asked()
    assert "HTTPS_PROXY" in verdict.hub_message
    assert "http://host:port" in verdict.remedy


def test_proxy_for_leaves_out_what_goes_past_the_proxy(monkeypatch):
    """NO_PROXY counts as it does for the client."""
    monkeypatch.setenv("HTTPS_PROXY", "http://nosuchproxy.invalid:3128")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,hub.example")
    assert proxy_for("https://hub.example/x") is None
    assert proxy_for("http://127.0.0.1:1/x") is None
    assert proxy_for("https://other.example").host == "nosuchproxy.invalid:3128"


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_fault_names_certificates_that_are_not_there(monkeypatch, variable):
    """The client would say that some file was not found."""
    monkeypatch.setenv(variable, "/nope/ca.pem")
    verdict = asked()
    assert f"{variable} names /nope/ca.pem, which is not there" in verdict.hub_message
    assert variable in verdict.remedy


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_check_here_reads_the_certificate_variable_of_other_clients(
    certificates, tmp_path, monkeypatch, variable
):
    """People set it for requests, and this client reads another one."""
    with LocalHub([Repo(TINY_REPO, single_files())], tls=certificates.server) as hub:
        monkeypatch.setenv(variable, str(certificates.authority))
        config = access(hub, tmp_path, hub.issue_token(), **LIMITS)
        verdict = check_here(MODEL, config)
        assert verdict.outcome is Outcome.HUB_UNREACHABLE
        assert "TLS certificate of 127.0.0.1" in verdict.hub_message
        assert f"{variable} is set" in verdict.remedy
        assert f"SSL_CERT_FILE={certificates.authority}" in verdict.remedy
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates.authority))
        assert check_here(MODEL, config).outcome is Outcome.GRANTED


def test_check_here_says_where_to_put_an_unknown_authority(certificates, tmp_path, monkeypatch):
    """Without any variable, and with a file that lacks it."""
    with LocalHub([Repo(TINY_REPO, single_files())], tls=certificates.server) as hub:
        config = access(hub, tmp_path, hub.issue_token(), **LIMITS)
        assert "Set SSL_CERT_FILE" in check_here(MODEL, config).remedy
        with pytest.raises(ModelLoadError, match="Set SSL_CERT_FILE"):
            fetch(MODEL, config, COMMIT)


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "SSL_CERT_FILE", "ALL_PROXY"])
def test_fetch_names_certificates_as_well(monkeypatch, variable):
    """A replica has an environment of its own."""
    values = {"ALL_PROXY": "socks5://127.0.0.1:1", "SSL_CERT_FILE": "/nope"}
    monkeypatch.setenv(variable, values.get(variable, "http://nosuchproxy.invalid:3128"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(ModelLoadError, match=variable):
        fetch(MODEL, AccessConfig(endpoint=HUB), COMMIT)


@pytest.mark.parametrize(
    ("url", "host"),
    [("https://u:p@h:1/x?y#z", "h:1"), ("http://h", "h"), ("https://[::1]:5/", "[::1]:5")],
)
def test_host_of_has_no_credentials(url, host):
    """Nor path, nor signature."""
    assert host_of(url) == host


@pytest.mark.parametrize(
    "error",
    [httpx2.ConnectError("x"), httpx2.ReadTimeout("x"), httpx2.ProxyError("x"), OSError("x"),
     httpx2.RemoteProtocolError("x"), ValueError("x"), httpx2.InvalidURL("x")],
)  # fmt: skip
def test_fault_of_quotes_no_url(error):
    """It may be signed."""
    fault = fault_of(error, "https://cdn.example/x?Signature=secret", 1.0)
    assert "cdn.example" in fault.message
    assert "secret" not in fault.message + str(fault.remedy)
