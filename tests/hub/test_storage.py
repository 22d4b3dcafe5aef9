"""The CDN and the Xet store: signed URLs, ranges, their own refusals, no Hub token."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.utils._xet import (
    XetFileData,
    parse_xet_file_data_from_response,
    refresh_xet_connection_info,
)

from scripts.local_hub import Behaviour, LocalHub, Repo, Route
from tests.conftest import TINY_REPO, tiny_files

SHARD = "model-00001-of-00002.safetensors"
CONTENT = tiny_files()[SHARD]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def location(hub: LocalHub, token: str) -> str:
    url = f"{hub.url}/{TINY_REPO}/resolve/main/{SHARD}"
    return httpx.head(url, headers=bearer(token)).headers["location"]


@pytest.mark.parametrize(
    ("asked", "span"),
    [
        ("bytes=0-7", (0, 8)),
        ("bytes=8-", (8, len(CONTENT))),
        ("bytes=-4", (len(CONTENT) - 4, len(CONTENT))),
        ("bytes=10-99999999", (10, len(CONTENT))),
    ],
)
def test_ranges(hub: LocalHub, asked: str, span: tuple[int, int]):
    """The CDN answers 206 with exactly the bytes that were asked for."""
    start, stop = span
    answer = httpx.get(location(hub, hub.issue_token()), headers={"Range": asked})
    assert (answer.status_code, answer.content) == (206, CONTENT[start:stop])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(CONTENT)}"
    entry = hub.log[-1]
    assert (entry.origin, entry.range, entry.bytes_sent) == ("cdn", asked, stop - start)


@pytest.mark.parametrize("asked", ["bytes=99999999-", "bytes=-0", "bytes=5-2", "lines=1-2"])
def test_unsatisfiable_ranges(hub: LocalHub, asked: str):
    """A range that is not there is 416 with the size."""
    answer = httpx.get(location(hub, hub.issue_token()), headers={"Range": asked})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(CONTENT)}"


def test_signature_opens_one_file(hub: LocalHub):
    """Without its signature, with another's or with a changed expiry a URL opens nothing."""
    url = httpx.URL(location(hub, hub.issue_token()))
    other = "0" * 64
    later = str(int(url.params["Expires"]) + 1)
    for bad in (
        url.copy_with(query=None),
        url.copy_with(path=url.path.rsplit("/", 1)[0] + f"/{other}"),
        url.copy_set_param("Expires", later),
        url.copy_set_param("Key-Pair-Id", "0" * 16),
    ):
        answer = httpx.get(bad)
        assert answer.status_code == 403
        assert b"AccessDenied" in answer.content
    assert httpx.get(url).content == CONTENT


def test_signature_expires():
    """A signed URL is of no use after its time."""
    with LocalHub([Repo(TINY_REPO, tiny_files())], link_lifetime_s=-1) as hub:
        assert httpx.get(location(hub, hub.issue_token())).status_code == 403


def test_cdn_denied_and_down(hub: LocalHub):
    """The Hub can say yes while the bytes are refused, or nobody listens there."""
    denied = location(hub, hub.issue_token(Behaviour.cdn_denied))
    down = location(hub, hub.issue_token(Behaviour.cdn_down))
    assert httpx.get(denied).status_code == 403
    with pytest.raises(httpx.ConnectError):
        httpx.get(down)


def test_cdn_cut(hub: LocalHub):
    """The bytes can stop halfway, with the length of the whole announced."""
    url = location(hub, hub.issue_token(Behaviour.cdn_cut))
    with pytest.raises(httpx.RemoteProtocolError, match="received 580 bytes, expected 1160"):
        httpx.get(url)
    assert hub.log[-1].bytes_sent == len(CONTENT) // 2


@pytest.mark.parametrize(
    ("fault", "outcome"),
    [(Behaviour.garbage, 200), (Behaviour.server_error, 503), (Behaviour.hang, None)],
)
def test_faults_of_the_cdn_alone(hub: LocalHub, fault: Behaviour, outcome: int | None):
    """A fault limited to the CDN leaves the Hub's own answers whole."""
    url = location(hub, hub.issue_token(fault, on=[Route.cdn]))
    try:
        answer = httpx.get(url, headers={"Range": "bytes=0-7"}, timeout=0.2)
    except httpx.ReadTimeout:
        assert outcome is None
    else:
        assert answer.status_code == outcome
        assert answer.content != CONTENT[:8]


def test_leaked_token_is_reported(hub: LocalHub):
    """A token that reaches the CDN is in the log as a leak; the answer is as always."""
    token = hub.issue_token()
    assert httpx.get(location(hub, token), headers=bearer(token)).content == CONTENT
    assert [entry.authorization_leaked for entry in hub.log] == [False, True]


def test_anonymous_weights_of_a_public_repository(tmp_path):
    """Public weights come without any token."""
    with LocalHub([Repo("acme/open", tiny_files(), gated=False)]) as hub:
        place = snapshot_download("acme/open", endpoint=hub.url, token=False, cache_dir=tmp_path)
        assert (Path(place) / SHARD).read_bytes() == CONTENT


def test_large_files_are_streamed_from_disk(tmp_path):
    """A file on disk arrives whole; a range far into it is found without reading the rest."""
    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(64 << 20)
        file.seek(48 << 20)
        file.write(b"needle")
    with LocalHub([Repo("acme/big", {"model.safetensors": weights})]) as hub:
        url = f"{hub.url}/acme/big/resolve/main/model.safetensors"
        target = httpx.head(url, headers=bearer(hub.issue_token())).headers["location"]
        start = 48 << 20
        part = httpx.get(target, headers={"Range": f"bytes={start}-{start + 5}"})
        assert part.content == b"needle"
        with httpx.stream("GET", target) as answer:
            sizes = [len(chunk) for chunk in answer.iter_bytes()]
        assert sum(sizes) == 64 << 20


class TestXet:
    """A repository whose weights live in the Xet store."""

    @pytest.fixture
    def xet(self, hub: LocalHub) -> LocalHub:
        hub.add_repo(Repo(TINY_REPO, tiny_files(), xet=True))
        return hub

    def file_data(self, hub: LocalHub, token: str) -> XetFileData:
        url = f"{hub.url}/{TINY_REPO}/resolve/main/{SHARD}"
        data = parse_xet_file_data_from_response(
            httpx.head(url, headers=bearer(token)), endpoint=hub.url
        )
        assert data is not None
        return data

    def test_probe(self, xet: LocalHub):
        """The client's own parser finds hash and token route; the store answers its token."""
        token = xet.issue_token()
        data = self.file_data(xet, token)
        store = refresh_xet_connection_info(file_data=data, headers=bearer(token))
        url = f"{store.endpoint}/v2/reconstructions/{data.file_hash}"
        answer = httpx.get(url, headers={**bearer(store.access_token), "Range": "bytes=0-0"})
        assert answer.status_code == 200
        (parts,) = answer.json()["xorbs"].values()
        first = httpx.get(parts[0]["url"], headers={"Range": "bytes=0-7"})
        assert first.content == CONTENT[:8]
        assert not any(entry.authorization_leaked for entry in xet.log)

    def test_store_refuses_the_hub_token(self, xet: LocalHub):
        """The Hub's token opens nothing at the store and is reported as a leak."""
        token = xet.issue_token()
        data = self.file_data(xet, token)
        store = refresh_xet_connection_info(file_data=data, headers=bearer(token))
        url = f"{store.endpoint}/v2/reconstructions/{data.file_hash}"
        assert httpx.get(url, headers=bearer(token)).status_code == 401
        assert xet.log[-1].authorization_leaked

    @pytest.mark.parametrize(
        ("behaviour", "status"), [(Behaviour.pending, 403), (Behaviour.auth_ok_files_denied, 403)]
    )
    def test_no_token_without_the_grant(self, xet: LocalHub, behaviour: Behaviour, status: int):
        """The read token is content: the gate stands before it."""
        url = f"{xet.url}/api/models/{TINY_REPO}/xet-read-token/main"
        answer = httpx.get(url, headers=bearer(xet.issue_token(behaviour)))
        assert answer.status_code == status
        assert "x-xet-access-token" not in answer.headers

    def test_store_denied_and_down(self, xet: LocalHub):
        """The store can refuse, or be out of reach, after the Hub said yes."""
        for behaviour in (Behaviour.cdn_denied, Behaviour.cdn_down):
            token = xet.issue_token(behaviour)
            data = self.file_data(xet, token)
            store = refresh_xet_connection_info(file_data=data, headers=bearer(token))
            url = f"{store.endpoint}/v2/reconstructions/{data.file_hash}"
            if behaviour is Behaviour.cdn_denied:
                assert httpx.get(url, headers=bearer(store.access_token)).status_code == 403
            else:
                with pytest.raises(httpx.ConnectError):
                    httpx.get(url, headers=bearer(store.access_token))

    def test_plain_repositories_have_no_xet_route(self, hub: LocalHub):
        """Without Xet there is no read token to have."""
        url = f"{hub.url}/api/models/{TINY_REPO}/xet-read-token/main"
        assert httpx.get(url, headers=bearer(hub.issue_token())).status_code == 404
