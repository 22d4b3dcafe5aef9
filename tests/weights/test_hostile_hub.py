"""A Hub, a mirror or a man in the middle that means ill: 0 bytes outside, 0 tokens elsewhere.

Each attack ends in one sentence, with the disk and the time that it may take bounded.
"""

import gzip
import json
import os
import time
from pathlib import Path

import pytest

from serve_app.access.hub import download, listing, pace, transfer
from serve_app.config import AccessConfig, ModelConfig
from serve_app.errors import AccessDenied, ModelLoadError
from serve_app.weights.fetch import fetch
from tests.access.cases import fake_token, single_files
from tests.hostile import COMMIT, REPO, HostileHub, Page, entry

pytestmark = pytest.mark.slow

MODEL = ModelConfig(repo_id=REPO)
SECOND_S = 30.0  # far above what any attack takes here, far below what one without limits would
FILES = {name: content for name, content in single_files().items() if name != "README.md"}


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    # Short limits, and no pauses between tries.
    monkeypatch.setattr(pace.Pace.__init__, "__kwdefaults__", {"stall_s": 0.6, "least_bytes": 4096})
    monkeypatch.setattr(transfer, "HEADERS_S", 0.5)
    monkeypatch.setattr(download.HubDownload.files, "__kwdefaults__", {"budget_s": 4.0})
    monkeypatch.setattr(download, "TRIES", 2)
    with HostileHub(dict(FILES)) as running:
        yield running


@pytest.fixture
def config(hub, tmp_path):
    token = tmp_path / "token"
    token.write_text(fake_token())
    return AccessConfig(endpoint=hub.url, token_file=str(token), timeout_s=0.5)


def tree(folder):
    """Everything below a folder, with contents and what links lead to."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        kind = f"-> {path.readlink()}" if path.is_symlink() else ""
        found[str(path)] = kind or (path.read_bytes() if path.is_file() else None)
    return found


def refused(config, own_cache, hub):
    """Fetch the model; it has to fail in one sentence that holds no secret."""
    began = time.monotonic()
    with pytest.raises((ModelLoadError, AccessDenied)) as caught:
        fetch(MODEL, config, COMMIT)
    assert time.monotonic() - began < SECOND_S
    message = caught.value.message
    assert "\n" not in message
    assert len(message) < 600
    assert message.isprintable()
    assert Path(config.token_file).read_text() not in message
    assert hub.tokens_elsewhere() == []
    assert disk_bytes(own_cache) < 1 << 20
    return message


def disk_bytes(folder):
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def test_fetch_takes_an_honest_answer(hub, config):
    """The baseline: what the attacks change is what is refused."""
    directory = fetch(MODEL, config, COMMIT).directory
    assert {path.name for path in directory.iterdir()} == set(FILES)
    assert hub.tokens_elsewhere() == []


NAMES = [
    "../../../../x.json", "../x.json", "a/../../x.json", "sub/../../../blobs/x.json", "..", ".",
    "./x.json", "/absolute.json", "//x.json", "", "a//b.json", "a/", "/", "x\0y.json", "\0",
    "a/./b.json", "..\0/x.json", "\ud800.json", 7, None, ["x.json"], {"a": 1}, True,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:30])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_listing_with_names_that_lead_out_is_refused(hub, config, own_cache, tmp_path, name, kind):
    """No repository holds such a name, so whoever lists it is no Hub."""
    before = tree(tmp_path)
    hub.listing.append(entry(name, b"{}", type=kind))
    message = refused(config, own_cache, hub)
    assert "list of files" in message
    left = {path: kind for path, kind in tree(tmp_path).items() if path not in before}
    assert [path for path, kind in left.items() if kind] == []  # no bytes, no link, anywhere
    assert all(path.startswith(str(own_cache)) for path in left)


@pytest.mark.parametrize(
    "name",
    ["n" * 300 + ".json", "é" * 200 + ".json", "con.json", "AUX.json", "lpt1.txt", "a\\b.json",
     "a\nb.json", "a\u202eb.json", "a\x7f.json", " a.json", "~a.json", "LICENSE.", "LICENSE "],
    ids=lambda name: ascii(name)[:24],
)  # fmt: skip
def test_listing_with_odd_names_leaves_them(hub, config, own_cache, tmp_path, name):
    """Over-long, reserved, invisible: a model's own files have none of it."""
    hub.listing.append(entry(name))
    hub.files[name] = b"{}"
    assert "name" in refused(config, own_cache, hub)
    assert not list(own_cache.rglob("snapshots/*/*"))


@pytest.mark.parametrize(
    "names",
    [("Config.json",), ("config.json",), ("TOKENIZER.json",), ("key.json", "\u212aey.json"),
     ("\u00e9.json", "e\u0301.json"), ("stra\u00dfe.txt", "STRASSE.txt")],
    ids=ascii,
)  # fmt: skip
def test_listing_with_names_that_some_file_systems_hold_for_one_is_refused(
    hub, config, own_cache, names
):
    """By letter case or composition: what is checked must be what is read later."""
    hub.listing += [entry(name) for name in names]
    message = refused(config, own_cache, hub)
    assert "twice" in message or "letter case" in message


def test_listing_with_a_file_that_is_a_folder_of_another_is_refused(hub, config, own_cache):
    """Whichever of them came first would be in the other's way."""
    weights = hub.files.pop("model.safetensors")
    index = {
        "metadata": {},
        "weight_map": {"a": "w.safetensors", "b": "w.safetensors/a.safetensors"},
    }
    hub.files |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "w.safetensors": weights,
        "w.safetensors/a.safetensors": weights,
    }
    hub.listing = [entry(path, content) for path, content in hub.files.items()]
    assert "is a file and the folder" in refused(config, own_cache, hub)


@pytest.mark.parametrize(
    "changes",
    [{"size": -5}, {"size": 10**18}, {"size": "12"}, {"size": None}, {"size": 1.5}, {"size": True},
     {"oid": "../../evil"}, {"oid": ""}, {"oid": None}, {"oid": "G" * 40}, {"oid": "a" * 41},
     {"oid": 7}, {"lfs": {"oid": "../../../x", "size": 2}}, {"lfs": {"oid": "a" * 64, "size": -1}},
     {"lfs": {"oid": "a" * 64, "size": "x"}}, {"xetHash": "../x"}, {"type": "symlink"},
     {"type": None}],
    ids=str,
)  # fmt: skip
def test_listing_with_impossible_sizes_and_hashes_is_refused(hub, config, own_cache, changes):
    """They become file names, allocations and limits."""
    hub.listing[0] |= changes
    assert "list of files" in refused(config, own_cache, hub)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[1]", b"null", b"[[[]]]", b"[" * 100_000, b"<html>login</html>", b"\xff" * 99,
     b'[{"type":"file"}]', b"9" * 10_000],
    ids=lambda body: body[:12].decode("latin1"),
)  # fmt: skip
def test_listing_that_is_none_is_refused(hub, config, own_cache, body):
    """Whatever it is instead."""
    hub.pages["/tree/"] = Page(body)
    refused(config, own_cache, hub)


def test_listing_whose_next_page_is_itself_ends(hub, config, own_cache):
    """At the second answer that is the first one again."""
    hub.next_link = f"{hub.url}/api/models/{REPO}/tree/{COMMIT}?cursor=1"
    assert "list of files" in refused(config, own_cache, hub)
    assert len(hub.seen) <= 3


def test_listing_that_never_ends_is_bounded(hub, config, own_cache, monkeypatch):
    """In pages, whatever each of them says."""
    monkeypatch.setattr(listing, "PAGES", 20)
    count = iter(range(10_000))
    answer = hub.answer

    def fresh(path):
        if "/tree/" in path:
            hub.listing = [entry(f"sub/{next(count)}.bin")]
            hub.next_link = f"{hub.url}/x?cursor={next(count)}"
        return answer(path)

    hub.answer = fresh
    assert "does not end within 20 pages" in refused(config, own_cache, hub)
    assert len(hub.seen) == 20


def test_listing_goes_on_at_the_hubs_own_place(hub, config):
    """A link to another origin gets neither the question nor the token."""
    both = list(hub.listing)
    hub.listing, rest = both[:1], both[1:]
    hub.next_link = f"{hub.elsewhere}/api/models/{REPO}/tree/{COMMIT}?cursor=two"
    answer = hub.answer

    def second(path):
        if "cursor=two" in path:
            hub.listing, hub.next_link = rest, ""
        return answer(path)

    hub.answer = second
    assert fetch(MODEL, config, COMMIT).hub_bytes > 0
    assert {seen.port for seen in hub.seen} == {int(hub.url.rpartition(":")[2])}


@pytest.mark.parametrize("link", ["http://[", "", "?", "ftp://x/?cursor", "x?cursor="])
def test_listing_ends_at_a_next_page_without_a_place(hub, config, own_cache, link):
    """Nothing is guessed."""
    hub.pages["/tree/"] = Page(
        json.dumps(hub.listing).encode(), headers={"link": f'<{link}>; rel="next"'}
    )
    assert "list of files" in refused(config, own_cache, hub)


@pytest.mark.parametrize("part", ["/tree/", "/resolve/"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_fetch_sends_no_token_along_a_redirect_to_another_origin(hub, config, part, status):
    """Of a listing it is not followed, of a file it is, without the token."""
    answer = hub.answer

    def sent_away(path):
        port = hub.seen[-1].port
        if part in path and str(port) in hub.url:
            return Page(b"", status, {"location": hub.elsewhere + path})
        return answer(path)

    hub.answer = sent_away
    if part == "/tree/":
        with pytest.raises(ModelLoadError):
            fetch(MODEL, config, COMMIT)
    else:
        assert fetch(MODEL, config, COMMIT).hub_bytes > 0
        assert any(str(seen.port) in hub.elsewhere for seen in hub.seen)
    assert hub.tokens_elsewhere() == []


@pytest.mark.parametrize(
    "location",
    ["/{path}", "file:///etc/passwd", "ftp://127.0.0.1/x", "http://", "http://[", "//", "gopher:x"],
)
def test_fetch_ends_at_redirects_that_lead_nowhere(hub, config, own_cache, location):
    """In a circle, to another protocol, to no host."""
    answer = hub.answer

    def sent_away(path):
        if "/resolve/" not in path:
            return answer(path)
        return Page(b"", 302, {"location": location.format(path=path.lstrip("/"))})

    hub.answer = sent_away
    refused(config, own_cache, hub)
    assert len(hub.seen) < 60


@pytest.mark.parametrize("length", [None, "99999999999", "64"], ids=["none", "too much", "right"])
def test_fetch_takes_no_more_than_the_announced_bytes_of_a_file(hub, config, own_cache, length):
    """14 bytes announced, gigabytes sent."""
    headers = {} if length is None else {"content-length": length}
    page = Page(b"x" * 65_536, headers=headers, is_endless=True)
    hub.pages["/resolve/"] = page
    refused(config, own_cache, hub)
    assert hub.sent_bytes < 16 << 20


@pytest.mark.parametrize("part", ["/tree/", "config.json"])
def test_fetch_reads_no_more_than_a_listing_may_have(hub, config, own_cache, monkeypatch, part):
    """Nor of a small file that is read before anything is stored."""
    monkeypatch.setattr(listing, "PAGE_BYTES", 1 << 20)
    hub.pages[part] = Page(b"[" + b" " * 65_535, is_endless=True)
    refused(config, own_cache, hub)
    assert hub.sent_bytes < 24 << 20


@pytest.mark.parametrize("part", ["/tree/", "model.safetensors", "config.json"])
@pytest.mark.parametrize("where", ["drip_s", "headers_drip_s"])
def test_fetch_gives_up_a_byte_at_a_time(hub, config, own_cache, part, where):
    """Each byte comes in time; the whole would take a day."""
    page = Page(b" " * 100_000, **{where: 0.2})
    if part != "/tree/":
        hub.listing = [
            entry(item["path"], b" " * 100_000) if part in str(item["path"]) else item
            for item in hub.listing
        ]
    hub.pages[part] = page
    refused(config, own_cache, hub)


@pytest.mark.parametrize("part", ["/tree/", "config.json", "model.safetensors"])
def test_fetch_unpacks_nothing(hub, config, own_cache, part):
    """A few KB can unpack to gigabytes, so what comes packed unasked is refused."""
    packed = gzip.compress(b" " * (32 << 20))
    hub.pages[part] = Page(packed, headers={"content-encoding": "gzip"})
    refused(config, own_cache, hub)


@pytest.mark.parametrize(
    "headers",
    [
        {"content-range": "bytes 5-9/99"},
        {"content-range": "bytes 0-1/99"},
        {"content-range": "x"},
        {},
    ],
)
def test_fetch_refuses_another_part_than_was_asked_for(hub, config, own_cache, headers):
    """It would be put in the wrong place."""
    hub.pages["model.safetensors"] = Page(FILES["model.safetensors"], 206, headers)
    refused(config, own_cache, hub)


def test_fetch_refuses_other_bytes_than_listed(hub, config, own_cache):
    """Of the same length; nothing of it is left under a name."""
    hub.pages["model.safetensors"] = Page(bytes(len(FILES["model.safetensors"])))
    assert "other bytes than listed" in refused(config, own_cache, hub)
    assert not list(own_cache.rglob("model.safetensors"))


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../../../../x.safetensors"}},
        {"weight_map": {"a": "/etc/x.safetensors"}},
        {"weight_map": {"a": "config.json"}},
        {"weight_map": {"a": 7}},
        {"weight_map": {"a": "x\0.safetensors"}},
        {"weight_map": {"a": "absent.safetensors"}},
        {"weight_map": []},
        {"weight_map": {}},
        [],
        "x",
    ],
    ids=str,
)
def test_index_that_names_no_files_of_the_repository_is_refused(hub, config, own_cache, index):
    """And those are safetensors files."""
    del hub.files["model.safetensors"]
    hub.files["model.safetensors.index.json"] = json.dumps(index).encode()
    hub.listing = [entry(path, content) for path, content in hub.files.items()]
    refused(config, own_cache, hub)


@pytest.mark.parametrize("named", ["../../x.safetensors", "/x.safetensors", "x.bin", 7, ["x"]])
def test_config_json_that_names_no_file_of_the_repository_is_refused(hub, config, own_cache, named):
    """Transformers takes the weights' name from there."""
    hub.files["config.json"] = json.dumps({"transformers_weights": named}).encode()
    hub.listing = [entry(path, content) for path, content in hub.files.items()]
    assert "transformers_weights" in refused(config, own_cache, hub)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_file_that_is_read_whole_may_not_be_huge(hub, config, own_cache, name):
    """Announced as such, it is not even asked for."""
    hub.listing = [item for item in hub.listing if item["path"] != name]
    hub.listing.append(entry(name, size=1 << 32))
    assert name in refused(config, own_cache, hub)


def test_listing_of_too_many_files_is_refused(hub, config, own_cache):
    """A listing fits a memory and a disk's folder."""
    hub.listing += [entry(f"{number}.json") for number in range(5000)]
    assert "more than 4096" in refused(config, own_cache, hub)


@pytest.mark.parametrize(
    "kept",
    [
        {"format_version": 1, "files": {"../../../../x.json": {"size": 2, "blob_id": "a" * 40}}},
        {"format_version": 1, "files": {"x.json": {"size": -2, "blob_id": "a" * 40}}},
        {"format_version": 1, "files": {"x.json": {"size": 2, "blob_id": "../../../x"}}},
        {"format_version": 1, "files": {"x.json": {"size": 2}}},
        {"format_version": 1, "files": {"x.json": 7}},
        {"format_version": 1, "files": []},
        {"format_version": 2, "files": {}},
        [],
        None,
    ],
    ids=str,
)
def test_listing_that_is_kept_is_checked_as_well(hub, config, own_cache, kept):
    """Of an older run, of other tools, of whoever writes to the cache: the Hub is asked again."""
    trees = own_cache / "models--evil--model" / "trees"
    trees.mkdir(parents=True)
    (trees / f"{COMMIT}.json").write_text(json.dumps(kept))
    directory = fetch(MODEL, config, COMMIT).directory
    assert {path.name for path in directory.iterdir()} == set(FILES)
    assert "../" not in (trees / f"{COMMIT}.json").read_text()


LINKS = {
    "the repository": "models--evil--model",
    "blobs": "models--evil--model/blobs",
    "snapshots": "models--evil--model/snapshots",
    "the commit": f"models--evil--model/snapshots/{COMMIT}",
    "trees": "models--evil--model/trees",
    "our own": ".serve-app",
    "notes": ".serve-app/verified",
    "notes of the repository": ".serve-app/verified/models--evil--model",
}


@pytest.mark.parametrize("place", LINKS.values(), ids=LINKS)
def test_store_follows_no_link_of_a_folder_that_leads_out(hub, config, own_cache, tmp_path, place):
    """Planted by somebody else, or by an older run: nothing is written through it."""
    outside = tmp_path / "outside"
    (outside / COMMIT).mkdir(parents=True)
    (outside / "config.json").write_text("mine")
    before = tree(outside)
    (own_cache / place).parent.mkdir(parents=True)
    (own_cache / place).symlink_to(outside)
    try:
        fetch(MODEL, config, COMMIT)
    except ModelLoadError as error:
        assert "is a link" in error.message  # noqa: PT017
        assert "HF_HUB_CACHE" in error.message  # noqa: PT017
    assert tree(outside) == before


@pytest.mark.parametrize("how", ["symbolic", "hard", "folder"])
@pytest.mark.parametrize("suffix", ["", ".incomplete"])
def test_store_follows_no_name_of_a_file_that_leads_out(
    hub, config, own_cache, tmp_path, how, suffix
):
    """A planted blob is replaced by the model's own, and the other file stays as it is."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    blobs = own_cache / "models--evil--model" / "blobs"
    blobs.mkdir(parents=True)
    name = entry("model.safetensors", FILES["model.safetensors"])["lfs"]["oid"] + suffix
    if how == "symbolic":
        (blobs / name).symlink_to(victim)
    elif how == "hard":
        os.link(victim, blobs / name)
    else:
        (blobs / name).mkdir()
    try:
        directory = fetch(MODEL, config, COMMIT).directory
    except ModelLoadError:
        assert how == "folder"
    else:
        assert (directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("how", ["symbolic", "hard"])
def test_store_replaces_a_pointer_that_leads_out(hub, config, own_cache, tmp_path, how):
    """Of a wrong file in the commit's folder the name goes, and nothing else."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    snapshot = own_cache / "models--evil--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    if how == "symbolic":
        (snapshot / "config.json").symlink_to(victim)
    else:
        os.link(victim, snapshot / "config.json")
    directory = fetch(MODEL, config, COMMIT).directory
    assert (directory / "config.json").read_bytes() == FILES["config.json"]
    assert victim.read_text() == "mine"


def test_store_refuses_a_folder_of_a_shard_that_leads_out(hub, config, own_cache, tmp_path):
    """Below the commit's folder, too."""
    weights = hub.files.pop("model.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "sub/w.safetensors"}}
    hub.files |= {
        "model.safetensors.index.json": json.dumps(index).encode(),
        "sub/w.safetensors": weights,
    }
    hub.listing = [entry(path, content) for path, content in hub.files.items()]
    outside = tmp_path / "outside"
    outside.mkdir()
    snapshot = own_cache / "models--evil--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "sub").symlink_to(outside)
    with pytest.raises(ModelLoadError, match="is a link"):
        fetch(MODEL, config, COMMIT)
    assert list(outside.iterdir()) == []
    (snapshot / "sub").unlink()
    assert fetch(MODEL, config, COMMIT).directory.joinpath("sub/w.safetensors").is_file()


def test_store_follows_no_lock_that_leads_out(hub, config, own_cache, tmp_path):
    """Nor made anywhere else."""
    (own_cache / ".serve-app").mkdir(parents=True)
    (own_cache / ".serve-app" / "evil--model.lock").symlink_to(tmp_path / "made")
    with pytest.raises(ModelLoadError, match="is a link"):
        fetch(MODEL, config, COMMIT)
    assert not (tmp_path / "made").exists()
