"""The swarm's decisions in a modelled network, at small scale; and one by one."""

import pytest

from scripts.bench.swarm import Simulation, World, churn, model, starters
from serve_app.weights import holdings, swarm
from serve_app.weights.pieces import Failed, File, Got, Report
from serve_app.weights.swarm import Swarm, Unknown

FILE = File("f" * 64, 10 * 100, 100)
READY = Report(slots=8, streams=8)
TOTAL = 14_000_000_000
WORLD = World(model(TOTAL, 20, 16 << 20), hub=5e8)  # 28 s from the Hub


def run(nodes, world=WORLD, **options):
    """Run a simulation; returns it, and how long each node that lives took."""
    simulation = Simulation(world, nodes, **options)
    simulation.run(1000)
    took = {
        node.name: node.done_at - node.joins_at
        for node in nodes
        if not node.is_liar and node.done_at is not None
    }
    assert len(took) == sum(not n.is_liar and n.dies_at == float("inf") for n in nodes)
    return simulation, took


@pytest.fixture(scope="module")
def one_copy_s():
    """How long one node alone takes from the Hub."""
    _, took = run(starters(1))
    return max(took.values())


@pytest.mark.parametrize("count", [4, 20])
def test_swarm_takes_the_time_of_one_copy(one_copy_s, count):
    """However many nodes start, and the Hub sends every byte once."""
    simulation, took = run(starters(count))
    assert max(took.values()) <= 1.15 * one_copy_s
    assert simulation.hub_bytes == pytest.approx(TOTAL, rel=0.001)
    for node in simulation.nodes.values():
        assert node.taken <= TOTAL * 1.001


@pytest.mark.parametrize("seed", [1, 2])
def test_swarm_with_a_liar_and_churn(one_copy_s, seed):
    """A tenth dies, as many join, one lies about bytes and lists: a file or two of twenty."""
    nodes = churn(starters(20, liars=1, seed=seed), share=0.1, until_s=20, seed=seed)
    simulation, took = run(nodes, seed=seed)
    assert max(took.values()) <= 1.3 * one_copy_s
    assert simulation.hub_bytes <= TOTAL * 1.15


def test_swarm_by_whole_files_from_the_hub(one_copy_s):
    """The chunk store's client gives no pieces, so a file is shared when it is whole."""
    simulation, took = run(starters(8), chunked=True)
    assert simulation.hub_bytes == pytest.approx(TOTAL, rel=0.001)
    assert max(took.values()) <= 1.5 * one_copy_s


def test_swarm_from_one_node_that_has_all():
    """Its line carries each piece few times; the Hub sends nothing."""
    simulation, took = run(starters(8), seeds=("seed",))
    assert simulation.hub_bytes == 0
    assert max(took.values()) <= 4 * TOTAL / WORLD.line  # of eight
    assert simulation.nodes["seed"].given <= 3 * TOTAL


def test_swarm_lost_and_begun_again(one_copy_s):
    """Who takes part says again what it has; nothing is fetched twice but what was on its way."""
    simulation = Simulation(WORLD, starters(6))
    simulation._at(10.0, lambda: setattr(simulation, "swarm", Swarm(seed=5)))
    simulation.run(1000)
    assert max(node.done_at or 1e9 for node in simulation.nodes.values()) <= 1.3 * one_copy_s
    assert simulation.hub_bytes <= 1.3 * TOTAL


def joined(*names, here=None, **options):
    decisions = Swarm(seed=0, **options)
    for name in names:
        decisions.join(name, [FILE], now=0.0, here={FILE: (here or {}).get(name, {})})
    return decisions


def pieces(orders):
    return sorted(p for order in orders for p in range(order.first, order.first + order.pieces))


def test_swarm_hub_pieces_have_one_taker():
    """Of two that start at once, each piece is ordered from the Hub by one."""
    decisions = joined("a", "b")
    first = decisions.exchange("a", READY, now=0.0).orders
    second = decisions.exchange("b", READY, now=0.0).orders
    assert pieces(first) == list(range(10))
    assert {order.source for order in first} == {None}
    assert second == []


def test_swarm_rare_pieces_first():
    """Those that the fewest have, and never from oneself."""
    here = {"a": dict.fromkeys(range(10), "x"), "b": dict.fromkeys(range(8), "x")}
    decisions = joined("a", "b", "c", here=here)
    orders = decisions.exchange("c", Report(slots=2), now=0.0).orders
    assert pieces(orders) == [8, 9]
    assert {order.source for order in orders} == {"a"}
    assert {order.digest for order in orders} == {"x"}


def test_swarm_gives_at_most_so_many_at_once():
    """Over all who ask; a piece that came, failed or was forgotten makes room."""
    decisions = joined("a", "b", "c", here={"a": dict.fromkeys(range(10), "x")})
    asked = decisions.exchange("b", Report(slots=20), now=0.0).orders
    assert len(asked) == holdings.GIVES
    assert decisions.exchange("c", READY, now=0.0).orders == []
    got = [Got(FILE, asked[0].first, "x", "a", asked[0].edition)]
    decisions.exchange("b", Report(got=got), now=1.0)
    assert {o.source for o in decisions.exchange("c", Report(slots=1), now=1.0).orders} <= {
        "a",
        "b",
    }
    decisions.leave("b")
    assert len(decisions.exchange("c", Report(slots=20), now=1.0).orders) >= 7


def test_swarm_node_that_fails_is_not_asked_again_for_a_while():
    """By the one who asked; what it alone has comes from the Hub."""
    decisions = joined("a", "b", here={"a": dict.fromkeys(range(10), "x")})
    (order,) = decisions.exchange("b", Report(slots=1), now=0.0).orders
    answer = decisions.exchange("b", Report(slots=8, streams=1, failed=[Failed(order)]), now=1.0)
    assert {each.source for each in answer.orders} == {None}
    assert decisions.exchange("b", Report(slots=8), now=holdings.SULK_S + 2).orders


@pytest.mark.parametrize("how", ["silent", "still", "busy", "left", "lost"])
def test_swarm_claims_of_a_dead_node_are_free(how):
    """By silence, without a byte, without a piece, by its word, or as the cluster says."""
    decisions = joined("a", "b")
    assert decisions.exchange("a", READY, now=0.0).orders
    at = 1.0
    if how in ("left", "lost"):
        (decisions.leave if how == "left" else decisions.lose)("a")
    else:
        limits = {"silent": swarm.SILENT_S, "still": swarm.STALL_S, "busy": swarm.CLAIM_S}
        at = limits[how] + 1
        for now in range(0, int(at) + 1, 5):
            if how != "silent":
                decisions.exchange("a", Report(moved=now if how == "busy" else 0), now=now)
            decisions.exchange("b", Report(moved=now), now=now)
    assert pieces(decisions.exchange("b", READY, now=at + 2).orders) == list(range(10))
    if how not in ("still", "busy"):
        with pytest.raises(Unknown):
            decisions.exchange("a", READY, now=at + 3)


def test_swarm_wrong_list_drops_its_author_for_who_found_out():
    """Nobody else: a complaint costs who complains, and the file comes by another list."""
    wrong = dict.fromkeys(range(10), "wrong")
    decisions = joined("liar", "b", "c", here={"liar": wrong})
    orders = decisions.exchange("b", Report(slots=8), now=0.0).orders
    assert {order.source for order in orders} == {"liar"}
    answer = decisions.exchange(
        "b", Report(slots=8, streams=8, refuted=[(FILE, orders[0].edition)]), now=1.0
    )
    assert {order.source for order in answer.orders} == {None}
    assert pieces(answer.orders) == list(range(10))
    assert len({order.edition for order in (*orders, *answer.orders)}) == 2
    others = decisions.exchange("c", Report(slots=8), now=1.0).orders
    assert {order.source for order in others} == {"liar"}


def test_swarm_takes_few_files_of_an_author_that_nobody_has_proven():
    """A liar about everything costs one file, not all of them."""
    files = [File(f"{n}" * 64, 3 << 30, 1 << 30) for n in range(4)]
    decisions = Swarm(seed=0)
    decisions.join("a", files, now=0.0, here={f: dict.fromkeys(range(3), "x") for f in files})
    decisions.join("b", files, now=0.0)
    orders = decisions.exchange("b", Report(slots=8), now=0.0).orders
    assert {order.file for order in orders} == {files[0]}
    got = [Got(order.file, order.first, "x", "a", order.edition) for order in orders]
    report = Report(slots=8, got=got, proven=[files[0]])
    assert len({o.file for o in decisions.exchange("b", report, now=1.0).orders}) == 2


def test_swarm_gives_no_say_to_who_claims_to_have_all():
    """In a list that others have begun from the Hub; it may give what they stated."""
    decisions = joined("a", "b")
    first = decisions.exchange("a", READY, now=0.0).orders[0]
    decisions.seed("liar")
    decisions.join("other", [], now=0.0, whole=[FILE])
    got = [Got(FILE, first.first, "x", None, first.edition)]
    assert decisions.exchange("a", Report(slots=8, got=got), now=1.0).orders == []
    (order,) = decisions.exchange("b", READY, now=1.0).orders
    assert (order.first, order.digest) == (first.first, "x")


def test_swarm_pieces_by_another_list_count_for_nothing():
    """A node that comes back with them is told which of them are right."""
    decisions = joined("a", here={"a": {0: "x", 1: "x"}})
    said = decisions.join("b", [FILE], now=0.0, here={FILE: {0: "y", 1: "x", 2: "z"}})
    (edition, right) = said[FILE]
    assert right == {1, 2}
    orders = decisions.exchange("b", Report(slots=8), now=0.0).orders
    assert pieces(orders) == [0]
    assert orders[0].edition == edition


@pytest.mark.parametrize(
    "file",
    [
        File("e" * 64, 1 << 60, 1),
        File("e" * 64, 10**100, 64 << 20),
        File("e" * 64, 10, 0),
        File("e" * 64, 10, -1),
        File("e" * 64, 0, 10),
    ],
)
@pytest.mark.parametrize("part", ["files", "whole"])
def test_swarm_refuses_files_of_more_pieces_than_a_commit_has(file, part):
    """Before it makes anything of that size; whoever said so has not joined, the others have."""
    decisions = joined("a")
    said = {"files": [FILE], part: [FILE, file]}
    with pytest.raises(ValueError, match="piece"):
        decisions.join("b", said.pop("files"), now=0.0, **said)
    with pytest.raises(Unknown):
        decisions.exchange("b", READY, now=0.0)
    assert pieces(decisions.exchange("a", READY, now=0.0).orders) == list(range(10))


def test_swarm_report_of_a_failure_that_cannot_be_costs_nothing():
    """An order of more pieces than the file has, of a node that nobody knows."""
    decisions = joined("a")
    order = decisions.exchange("a", READY, now=0.0).orders[0]
    for is_wrong in (False, True):
        wrong = Failed(order._replace(first=-5, pieces=1 << 60, source="nobody"), is_wrong)
        decisions.exchange("a", Report(failed=[wrong]), now=0.0)
    assert decisions.nodes == ["a"]
    assert pieces(decisions.exchange("a", READY, now=0.0).orders) == list(range(10))


def test_swarm_report_for_what_it_does_not_know_changes_nothing():
    """Other files, other lists, pieces that are none."""
    decisions = joined("a")
    other = File("e" * 64, 10, 10)
    report = Report(
        got=[Got(other, 0, "x", None, 1), Got(FILE, 99, "x", None, 1), Got(FILE, 0, "x", "b", 77)],
        proven=[other],
        refuted=[(other, 1), (FILE, 77)],
    )
    assert decisions.exchange("a", report, now=0.0).orders == []
    assert pieces(decisions.exchange("a", READY, now=0.0).orders) == list(range(10))
