"""`GET /usage`: a key sees its own, an admin's sees all, in numbers of the metrics."""

import hashlib

import pytest

from serve_app.api.keys import OTHER
from serve_app.api.status_page import KeyUse, Load, View
from tests.api.harness import Service, refusal

USED = {"a": KeyUse(9, 2, 300, 50), "gone": KeyUse(1, 0, 3, 4), OTHER: KeyUse(5)}


class Whole:
    """A service of which this is known."""

    def __init__(self, keys):
        self._load = None if keys is None else Load(0, 0, 0, 0, 0, keys=keys)

    async def look(self):
        return View(None)

    async def load(self):
        return self._load


@pytest.fixture
def usage(tmp_path):
    """Ask for the usage with a key, where so much is known; returns it by name."""
    fields = {
        "a": "name=a rpm=60 tpm=9000",
        "b": "name=b streams=3 priority=high",
        "root": "name=ops admin",
    }
    fields["a2"] = "name=a rpm=60 tpm=9000 expires=2999-01-01"
    text = "\n".join(f"{hashlib.sha256(k.encode()).hexdigest()} {v}" for k, v in fields.items())
    (tmp_path / "keys").write_text(text)

    async def ask(key, used=USED):
        service = Service(api_keys_file=str(tmp_path / "keys"), service=Whole(used))
        answer = await service.request("GET", "/usage", headers={"authorization": f"Bearer {key}"})
        assert answer.status_code == 200
        assert not service.records
        return {each.pop("name"): each for each in answer.json()["keys"]}

    return ask


async def test_usage_a_key_sees_its_own(usage):
    """With its limits; another key of the same name sees the same numbers."""
    limits = {"rpm": 60, "tpm": 9000, "streams": None}
    numbers = {"requests": 9, "limited": 2, "prompt_tokens": 300, "completion_tokens": 50}
    own = {**numbers, "limits": limits, "priority": "normal", "expires": None}
    assert await usage("a") == {"a": own}
    assert await usage("a2") == {"a": own | {"expires": "2999-01-01T00:00:00+00:00"}}
    unused = await usage("b")
    assert list(unused) == ["b"]
    assert (unused["b"]["requests"], unused["b"]["priority"]) == (0, "high")


async def test_usage_an_admin_sees_all(usage):
    """Of each name once, those that are in the file no more, and the rest together."""
    seen = await usage("root")
    assert list(seen) == ["a", "b", "ops", "gone", OTHER]
    assert seen["gone"]["prompt_tokens"] == 3
    assert seen[OTHER]["requests"] == 5


METRICS = """# TYPE ray_serve_app_key_requests_total counter
ray_serve_app_key_requests_total{application="llm",key="a",limited="no"} 9.0
ray_serve_app_key_requests_total{key="b"} 8.0
ray_serve_app_key_prompt_tokens_total{application="llm",key="other"} 7.0
ray_serve_app_requests_total{path="/v1/completions"} 17.0
"""


async def test_metrics_of_other_names_are_for_an_admin(tmp_path):
    """As in `/usage`: a key sees its own samples, and those that are of no key."""
    fields = {"a": "name=a", "x": "a note", "root": "name=ops admin"}
    text = "\n".join(f"{hashlib.sha256(k.encode()).hexdigest()} {v}" for k, v in fields.items())
    (tmp_path / "keys").write_text(text)

    async def page():
        return METRICS

    service = Service(api_keys_file=str(tmp_path / "keys"), metrics=page)

    async def seen(key):
        headers = {"authorization": f"Bearer {key}"}
        return (await service.request("GET", "/metrics", headers=headers)).text

    lines = METRICS.splitlines(keepends=True)
    assert await seen("a") == "".join(lines[:2] + lines[4:])
    assert await seen("x") == "".join(lines[:1] + lines[4:])
    assert await seen("root") == METRICS
    keyless = await Service(metrics=page).request("GET", "/metrics")
    assert keyless.text == METRICS


async def test_usage_what_nobody_knows_is_null(usage):
    """While the metrics cannot be had."""
    assert (await usage("a", None))["a"]["requests"] is None
    assert list(await usage("root", None)) == ["a", "b", "ops"]


async def test_usage_exists_with_keys_alone(tmp_path):
    """Without keys nobody is told apart; with them nobody sees it without one."""
    refusal(await Service(service=Whole(USED)).request("GET", "/usage"), 404)
    (tmp_path / "keys").write_text(hashlib.sha256(b"a").hexdigest())
    service = Service(api_keys_file=str(tmp_path / "keys"), service=Whole(USED))
    refusal(await service.request("GET", "/usage"), 401)
