"""Names in the Host header: a page that came here by DNS rebinding is not answered."""

import hashlib
import socket

import pytest

from serve_app.api.hosts import split_host
from tests.api.harness import CHAT, HELLO, Connection, Service, listening

HERE = ("127.0.0.1", 8000)
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "EVIL.example.:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example:8000",
    "localhos",
    "xlocalhost:8000",
    "999.0.0.1",
]
OWN = [
    "localhost",
    "LocalHost:8000",
    "localhost.:8000",
    "app.localhost:3000",
    "127.0.0.1:8000",
    "127.0.0.2",
    "[::1]:8000",
    "::1",
    "192.168.1.7:8000",
    "host.docker.internal:8000",
    "laptop.local",
    socket.gethostname(),
    "",
]


async def ask(service, host, *, server=HERE, path="/v1/models", method="GET", headers=()):
    """Return the status of one request that names a host."""
    connection = Connection(path)
    connection.scope["method"] = method
    connection.scope["server"] = server
    given = [] if host is None else [("host", host)]
    connection.scope["headers"] = [
        (name.encode(), value.encode()) for name, value in (*given, *headers)
    ]
    connection.feed(b"")
    await connection.run(service.app)
    return connection.status


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("server", [HERE, ("::1", 8000, 0, 0)[:2], ("::ffff:127.0.0.1", 8000)])
async def test_hosts_refuse_a_foreign_name_over_loopback_without_keys(host, server):
    """In the envelope, on every path, the page and the numbers behind it included."""
    service = Service(access=dict)
    for path in ("/", "/status", "/access", "/v1/models", "/version", CHAT):
        assert await ask(service, host, server=server, path=path) == 403, path
    assert not service.engine.requests


@pytest.mark.parametrize("host", OWN)
async def test_hosts_pass_this_machines_own_names_and_all_addresses(host):
    """An address cannot be rebound; a request without a name comes from no browser."""
    assert await ask(Service(), host) == 200


async def test_hosts_pass_a_request_without_a_host():
    """HTTP/1.0 has none."""
    assert await ask(Service(), None) == 200


async def test_hosts_refuse_one_foreign_name_of_two():
    """Whichever of them somebody further inside would read."""
    assert await ask(Service(), "localhost", headers=[("host", "evil.example")]) == 403


@pytest.mark.parametrize("server", [("10.0.0.7", 8000), ("fd00::7", 8000), ("/run/app.sock", None)])
async def test_hosts_pass_names_where_requests_come_over_a_network(server):
    """A service behind a name of its own, in a cluster or a container, works as it is."""
    assert await ask(Service(), "llm.corp.example", server=server) == 200


@pytest.mark.parametrize("header", ["x-forwarded-for", "forwarded", "via", "x-real-ip"])
async def test_hosts_let_a_proxy_on_this_machine_pass_its_own_name_on(header):
    """It says that it is one, and its port is not ours."""
    headers = [(header, "10.1.2.3")]
    for host in ("llm.corp.example", "llm.corp.example:443"):
        assert await ask(Service(), host, headers=headers) == 200


async def test_hosts_refuse_a_page_that_says_it_is_a_proxy():
    """Rebinding leads to our port, which the browser says in the Host header."""
    headers = [("x-forwarded-for", "10.1.2.3")]
    assert await ask(Service(), "evil.example:8000", headers=headers) == 403
    assert await ask(Service(), "evil.example", server=("127.0.0.1", 80), headers=headers) == 403


async def test_hosts_pass_names_behind_serves_own_proxy():
    """Then every request comes over loopback, whoever sent it."""
    assert await ask(Service(direct=False), "llm.corp.example:8000") == 200


async def test_hosts_pass_names_with_keys(tmp_path):
    """A page has no key."""
    (tmp_path / "keys").write_text(hashlib.sha256(b"k").hexdigest())
    service = Service(api_keys_file=str(tmp_path / "keys"))
    assert await ask(service, "llm.example", headers=[("authorization", "Bearer k")]) == 200


@pytest.mark.parametrize(
    ("allowed", "host", "status"),
    [
        (("llm.example",), "llm.example:8000", 200),
        (("LLM.example",), "llm.EXAMPLE", 200),
        (("llm.example",), "localhost:8000", 200),
        (("llm.example",), "10.2.3.4:8000", 200),
        (("llm.example",), "evil.example", 403),
        (("llm.example",), "a.llm.example", 403),
        (("*.corp.example",), "a.corp.example", 200),
        (("*.corp.example",), "a.b.corp.example", 200),
        (("*.corp.example",), "corp.example", 403),
        (("*.corp.example",), "evilcorp.example", 403),
        (("*",), "evil.example", 200),
        ((), "evil.example", 403),
    ],
)
async def test_hosts_pass_names_of_the_config(allowed, host, status):
    """Then they count wherever a request comes from."""
    for server in (HERE, ("10.0.0.7", 8000)):
        assert await ask(Service(allowed_hosts=allowed), host, server=server) == status


async def test_hosts_refuse_a_browsers_request_on_a_real_socket():
    """As it comes from one whose name leads to 127.0.0.1."""
    service = Service()
    async with listening(service.app) as url:
        port = url.rpartition(":")[2]
        for host, status in ((f"evil.example:{port}", 403), (f"localhost:{port}", 200)):
            import httpx

            async with httpx.AsyncClient(base_url=url) as client:
                answer = await client.post(CHAT, json=HELLO, headers={"host": host})
            assert answer.status_code == status
    assert "evil" not in answer.text


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("a:80", ("a", 80)),
        ("A", ("a", None)),
        ("[::1]:80", ("::1", 80)),
        ("[::1]", ("::1", None)),
        ("::1", ("::1", None)),
        ("a:²", ("a", None)),
        ("a:", ("a", None)),
        (" a. ", ("a", None)),
    ],
)
def test_split_host_takes_a_header_apart(value, parts):
    """Name and port, whatever a client writes."""
    assert split_host(value) == parts
