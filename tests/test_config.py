"""The config tree: strict, helpful, and without secrets."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.config import AppConfig, parse_args
from serve_app.endpoint import check_endpoint, is_plain_http
from serve_app.errors import ConfigError

MODEL = {"repo_id": "acme/tiny"}
TOKEN = "hf_" + "Qz7" * 12


def refused(args):
    with pytest.raises(ConfigError) as caught:
        parse_args(args)
    return caught.value.message


def test_parse_args_accepts_a_repo_alone():
    """Everything but the model has a default."""
    config = parse_args({"model": MODEL})
    assert config.model.name == "acme/tiny"
    assert config.model.dtype == "bfloat16"
    assert config.access.on_unreachable == "block"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            {"model": MODEL | {"revison": "x"}},
            "args.model.revison: unknown key; did you mean revision?",
        ),
        ({"model": MODEL | {"num_gpus": 1}}, "it belongs at args.replica.num_gpus"),
        ({"model": MODEL, "acess": {}}, "args.acess: unknown key; did you mean access?"),
        ({"model": MODEL, "engine": {"tokenfile": "x"}}, "did you mean args.access.token_file?"),
        ({"model": {}}, "set exactly one of repo_id"),
        ({"model": MODEL | {"path": "/m"}}, "set exactly one of repo_id"),
        ({"model": {"repo_id": "a/b/c"}}, "write it as owner/name"),
        ({"model": {"repo_id": "https://huggingface.co/a/b"}}, "write it as owner/name"),
        (
            {"model": MODEL, "replica": {"min_replicas": 3}},
            "min_replicas is larger than max_replicas",
        ),
        ({"model": MODEL, "access": {"endpoint": "hub.corp"}}, "is not a URL"),
        ({"model": MODEL, "access": {"endpoint": "https://u:p@hub"}}, "must not carry credentials"),
        ({"model": MODEL, "access": {"timeout_s": 0}}, "args.access.timeout_s"),
        ({}, "args.model"),
    ],
)
def test_parse_args_names_a_faults_key_and_the_fix(args, words):
    """One line says where the fault is and what is meant."""
    assert words in refused(args)


VLLM = {"backend": "vllm"}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("model", "other/model", "model belongs to the gate; set model.repo_id"),
        ("tokenizer", "other/model", "model.repo_id"),
        ("revision", "v2", "set model.revision"),
        ("hf_token", True, "see access.token_file"),
        ("trust_remote_code", True, "would load code"),
        ("download_dir", "/tmp", "HF_HOME"),
        ("load_format", "pt", "must be one of safetensors"),
        ("load_format", "auto", "must be one of safetensors"),
        ("max_model_len", 64, "engine.max_context_tokens"),
        ("max_num_seqs", 64, "engine.max_running_requests"),
        ("dtype", "half", "model.dtype"),
        ("served_model_name", "x", "model.served_name"),
        ("tensor_parallel_size", 2, "replica.num_gpus"),
        ("speculative_config", {"model": "other/draft"}, "has not proven"),
        ("enable_log_requests", True, "would log prompts"),
    ],
)
def test_parse_args_refuses_for_vllm_what_another_key_owns(name, value, words):
    """The message names the key that says it, and never the value."""
    message = refused({"model": MODEL, "engine": VLLM | {"vllm": {name: value}}})
    assert message.startswith("args.engine.vllm: ")
    assert words in message


def test_parse_args_takes_vllms_own_arguments_as_they_are():
    """Those that nobody else owns."""
    own = {
        "enforce_eager": True,
        "kv_cache_dtype": "fp8",
        "load_format": "fastsafetensors",
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
    }
    config = parse_args({"model": MODEL, "engine": VLLM | {"vllm": own}})
    assert config.engine.vllm == own
    assert parse_args({"model": MODEL}).engine.backend == "builtin"


def test_parse_args_wants_vllm_for_what_only_vllm_does():
    """Its arguments, and weights in whatever form they are stored."""
    assert "set backend: vllm" in refused({"model": MODEL, "engine": {"vllm": {"seed": 1}}})
    auto = MODEL | {"dtype": "auto"}
    assert "model.dtype auto needs engine.backend vllm" in refused({"model": auto})
    assert parse_args({"model": auto, "engine": VLLM}).model.dtype == "auto"
    gpus = {"model": MODEL, "engine": VLLM, "replica": {"num_gpus": 1.5}}
    assert "replica.num_gpus must be whole" in refused(gpus)
    assert parse_args(gpus | {"replica": {"num_gpus": 0.5}}).replica.num_gpus == 0.5


@pytest.mark.parametrize(
    ("adapters", "words"),
    [
        ([{"name": "x", "repo_id": "a/b/c"}], "args.model.adapters.0.repo_id: is not a Hub"),
        ([{"name": "", "repo_id": "a/b"}], "args.model.adapters.0.name"),
        ([{"name": "a\nb", "repo_id": "a/b"}], "args.model.adapters.0.name: must be a name"),
        ([{"name": "x", "repo_id": "a/.."}], "args.model.adapters.0.repo_id: is not a Hub"),
        ([{"name": "acme/tiny", "repo_id": "a/b"}], "has the name of the model"),
        ([{"name": "x", "repo_id": "a/b"}] * 2, "or of another adapter"),
        ([{"name": "x", "repo": "a/b"}], "did you mean repo_id?"),
        ([{"name": "x", "repo_id": "a/b", "path": "/x"}], "args.model.adapters.0.path"),
    ],
)
def test_parse_args_checks_adapters(adapters, words):
    """Their names are the API's; a repository is named as a model's is."""
    assert words in refused({"model": MODEL | {"adapters": adapters}, "engine": VLLM})


def test_parse_args_wants_vllm_for_adapters_and_pins_them_by_name():
    """The gate pins each; one that it did not name keeps its revision."""
    adapters = [{"name": "x", "repo_id": "a/x"}, {"name": "y", "repo_id": "a/y", "revision": "v1"}]
    model = MODEL | {"adapters": adapters}
    assert "model.adapters needs engine.backend vllm" in refused({"model": model})
    config = parse_args({"model": model, "engine": VLLM})
    pinned = config.with_adapters_at({"": "b" * 40, "x": "c" * 40, "y": None})
    assert [each.revision for each in pinned.model.adapters] == ["c" * 40, "v1"]
    assert pinned.model.revision == "main"
    found = config.model.at_commits({"": "b" * 40, "x": "c" * 40, "y": None})
    assert [(part.repo_id, commit) for part, commit in found] == [
        ("acme/tiny", "b" * 40),
        ("a/x", "c" * 40),
    ]
    own = refused({"model": MODEL, "engine": VLLM | {"vllm": {"enable_lora": True}}})
    assert "model.adapters" in own


def test_parse_args_reports_all_faults_at_once():
    """A person corrects the file once, not once per fault."""
    message = refused({"model": MODEL | {"revison": "x"}, "engine": {"max_batch_tokens": -1}})
    assert len(message.splitlines()) == 2


@pytest.mark.parametrize(
    "args",
    [
        {"model": MODEL, "access": {"token": TOKEN}},
        {"model": MODEL, "access": {"token_file": TOKEN}},
        {"model": MODEL, "access": {"token_env": TOKEN}},
        {"model": {"repo_id": TOKEN}},
        {"model": MODEL, TOKEN: 1},
        {"model": MODEL, "x": ["a", {"y": f"Bearer {TOKEN}"}]},
    ],
)
def test_parse_args_refuses_a_token_value_and_never_echoes_it(args):
    """The message says how to hand a token over and does not hold it."""
    message = refused(args)
    assert TOKEN not in message
    assert "HF_TOKEN environment variable" in message


def test_parse_args_does_not_echo_rejected_input():
    """A secret of an unknown shape does not leave through a validation message."""
    assert "s3cr3t" not in refused({"model": MODEL, "engine": {"max_batch_tokens": "s3cr3t"}})


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_parse_args_takes_any_tree_or_raises_a_config_error(tree):
    """Nothing but ConfigError ever leaves the parser."""
    with contextlib.suppress(ConfigError):
        assert isinstance(parse_args({"model": MODEL, "engine": tree}), AppConfig)


@pytest.mark.parametrize(
    "good", ["http://127.0.0.1:8090/", "http://[::1]:1", "http://localhost", "https://h.co"]
)
def test_check_endpoint_wants_https_or_loopback(good):
    """Plain http is safe within this machine only."""
    assert check_endpoint(good) == good.rstrip("/")
    assert not is_plain_http(good)


@pytest.mark.parametrize("url", ["http://h.co", "http://10.0.0.7:8090", "http://hub.mirror.svc"])
def test_is_plain_http_to_another_machine_is_a_choice(url):
    """A mirror inside the cluster; with a token it has to be allowed by name."""
    assert is_plain_http(url)
    for access in ({"endpoint": url}, {"endpoint": url, "token_file": "/t", "allow_http": True}):
        assert parse_args({"model": MODEL, "access": access}).access.endpoint == url
    with pytest.raises(ConfigError, match=r"access: endpoint is plain http.*allow_http"):
        parse_args({"model": MODEL, "access": {"endpoint": url, "token_file": "/t"}})


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ({"repo_id": "acme/tiny"}, ("acme/tiny",)),
        ({"repo_id": "acme/tiny", "served_name": "chat"}, ("chat", "acme/tiny")),
        (
            {"repo_id": "acme/tiny", "served_name": ["chat", "gpt-4o", "chat"]},
            ("chat", "gpt-4o", "acme/tiny"),
        ),
        ({"repo_id": "acme/tiny", "served_name": ["acme/tiny", "a"]}, ("acme/tiny", "a")),
        ({"path": "/models/tiny/"}, ("tiny",)),
        ({"path": "/models/tiny", "served_name": ["a", "b"]}, ("a", "b")),
    ],
)
def test_parse_args_takes_many_names_of_a_model(model, names):
    """One, or a list; the repository's always counts, and the first is its own."""
    config = parse_args({"model": model})
    assert config.model.names == names
    assert config.model.name == names[0]


@pytest.mark.parametrize(
    "served_name", ["", [], [""], ["a" * 257], ["a", "b\n"], "\ud800", 3, [3], {"a": 1}]
)
def test_parse_args_refuses_a_name_that_is_no_text(served_name):
    """An empty list would leave the model without one."""
    assert "args.model.served_name" in refused({"model": MODEL | {"served_name": served_name}})
