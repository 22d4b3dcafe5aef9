"""The `args:` of the gate in front of somebody else's application."""

import pytest

from serve_app.errors import ConfigError
from serve_app.gate_config import parse_gated

REPO = "acme/tiny"
COMMIT = "c" * 40


def args(builder="m:build", gate=None, **builder_args):
    return {
        "gate": {"model": {"repo_id": REPO}, **(gate or {})},
        "app": {"import_path": builder, "args": builder_args},
    }


def test_parse_gated_puts_the_commit_where_the_placeholder_stands():
    """Anywhere in the tree, also inside a text; nothing else changes."""
    gated = parse_gated(args(a=[{"rev": "${gate.commit}"}, "x@${gate.commit}", 1], b=None))
    assert gated.builder_args(COMMIT) == {"a": [{"rev": COMMIT}, f"x@{COMMIT}", 1], "b": None}


def test_parse_gated_needs_no_placeholder_for_ray_serve_llm():
    """The configs that load this repository get the commit as their engine's revisions."""
    source = {"model_id": "m", "model_source": REPO}
    gated = parse_gated(
        args(
            "ray.serve.llm:build_openai_app",
            llm_configs=[
                {"model_loading_config": source, "engine_kwargs": {"max_model_len": 9}},
                {"model_loading_config": {"model_id": REPO}},
                {"model_loading_config": {"model_id": "other/model"}},
            ],
        )
    )
    first, second, third = gated.builder_args(COMMIT)["llm_configs"]
    pins = {"revision": COMMIT, "tokenizer_revision": COMMIT}
    assert first["engine_kwargs"] == {"max_model_len": 9, **pins}
    assert second["engine_kwargs"] == pins
    assert "engine_kwargs" not in third


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (args(revision="main"), "nothing takes the commit; write ${gate.commit}"),
        (args("ray.serve.llm:build_openai_app", llm_configs=["m.yaml"]), "nothing takes"),
        (args("build", revision="${gate.commit}"), "must be `module:builder`"),
        (args(gate={"deployment": ["A"]}, r="${gate.commit}"), "gate.deployment: unknown key"),
        ({"gate": {"model": {"repo_id": REPO}}}, "args.app: Field required"),
        (args(token="hf_" + "a" * 34, r="${gate.commit}"), "holds a token's value"),
    ],
)
def test_parse_gated_refuses_wrong_args_without_their_values(wrong, words):
    """One line for each fault."""
    with pytest.raises(ConfigError) as caught:
        parse_gated(wrong)
    assert words in caught.value.message
    assert "a" * 34 not in caught.value.message


def test_parse_gated_puts_the_directory_where_its_placeholder_stands():
    """It says which version is loaded, so no other place for the commit is needed."""
    gated = parse_gated(args(model="${gate.path}", name="m-${gate.commit}"))
    assert gated.wants_path
    assert gated.builder_args(COMMIT, "/d") == {"model": "/d", "name": f"m-{COMMIT}"}
    assert parse_gated(args(model="${gate.path}")).builder_args(COMMIT, "/d") == {"model": "/d"}
    assert not parse_gated(args(r="${gate.commit}")).wants_path


def test_parse_gated_takes_no_commit_of_a_local_directory():
    """Its application loads the directory, whatever is in there."""
    gated = parse_gated(args(gate={"model": {"path": "/models/m"}}, directory="/models/m"))
    assert gated.builder_args("main") == {"directory": "/models/m"}


def test_parse_gated_wants_the_directory_of_a_source_without_commits():
    """Nothing else could load what was pinned: the listing's digest leads nowhere."""
    url = {"model": {"url": "s3://models/acme/tiny"}}
    gated = parse_gated(args(gate=url, model="${gate.path}"))
    assert gated.builder_args(COMMIT, "/d") == {"model": "/d"}
    with pytest.raises(ConfigError, match=r"no commit that could be loaded; write \$\{gate.path\}"):
        parse_gated(args(gate=url, revision="${gate.commit}"))
