"""Which nodes may host a replica."""

import pytest

from serve_app.cluster.nodes import Demand, demand_of, eligible, label_matches, shortage


def node(name, *, alive=True, labels=None, **resources):
    return {
        "NodeID": f"id-{name}",
        "NodeName": name,
        "Alive": alive,
        "Resources": {"CPU": 8.0, **resources},
        "Labels": labels or {},
    }


def names(nodes, *options, draining=()):
    found = eligible(nodes, [demand_of(option) for option in options], draining)
    return [entry.name for entry in found]


GPU = {"num_gpus": 1}


def test_eligible_counts_what_a_node_has_in_total():
    """Enough GPUs at once on one node; what is in use now does not matter."""
    nodes = [node("none"), node("one", GPU=1.0), node("eight", GPU=8.0)]
    assert names(nodes, {"num_gpus": 0}) == ["eight", "none", "one"]
    assert names(nodes, GPU) == ["eight", "one"]
    assert names(nodes, {"num_gpus": 4}) == ["eight"]
    assert names(nodes, {"num_cpus": 9}) == []


def test_eligible_gives_a_replica_one_cpu_as_serve_does():
    """A node without CPUs, as a head often is, cannot host one that does not say 0."""
    head = {**node("head"), "Resources": {"CPU": 0.0}}
    assert names([head], {}) == []
    assert names([head], {"num_cpus": 0}) == ["head"]


def test_eligible_does_not_count_dead_and_draining_nodes():
    """Nothing will be placed there any more."""
    nodes = [node("dead", alive=False), node("leaving"), node("here")]
    assert names(nodes, {}, draining={"id-leaving"}) == ["here"]


def test_eligible_by_accelerator_and_custom_resources():
    """By Ray's names for them."""
    nodes = [node("h100", **{"accelerator_type:H100": 1.0}), node("odd", odd=2.0), node("bare")]
    assert names(nodes, {"accelerator_type": "H100"}) == ["h100"]
    assert names(nodes, {"resources": {"odd": 1}}) == ["odd"]


def test_eligible_for_any_bundle_of_a_placement_group():
    """A node counts if it can host one of them."""
    nodes = [node("gpu", GPU=1.0), node("odd", odd=1.0), node("bare")]
    assert names(nodes, GPU, {"resources": {"odd": 1}}) == ["gpu", "odd"]


@pytest.mark.parametrize(
    ("selector", "value", "matches"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "a", False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a,b)", "b", True),
        ("in(a, b)", "b", True),
        ("in(a,b)", "c", False),
        ("in(a,b)", None, False),
        ("!in(a,b)", "a", False),
        ("!in(a,b)", "c", True),
        ("!in(a,b)", None, True),
    ],
)
def test_label_matches_the_four_forms_of_selectors(selector, value, matches):
    """The four forms that Ray has; a node without the label is not equal to anything."""
    assert label_matches(selector, value) is matches


def test_eligible_matches_all_labels():
    """Each key on its own."""
    nodes = [node("both", labels={"a": "1", "b": "2"}), node("one", labels={"a": "1"})]
    assert names(nodes, {"label_selector": {"a": "1", "b": "2"}}) == ["both"]


def test_shortage_says_what_is_asked_and_what_exists():
    """Equal nodes are counted, dead ones left out."""
    nodes = [node("a"), node("b"), node("c", GPU=1.0, labels={"zone": "x"}), node("d", alive=False)]
    text = shortage(nodes, [Demand({"CPU": 1, "GPU": 4}, {"zone": "y"})])
    assert text == (
        "a replica asks for CPU 1, GPU 4, label zone=y; the nodes that are alive: "
        "2 with CPU 8, GPU 0, label zone=unset; 1 with CPU 8, GPU 1, label zone=x"
    )
    assert "no node that is alive" in shortage([], [demand_of(GPU)])
