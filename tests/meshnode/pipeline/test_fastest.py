"""Plans for machines whose speed is known: what is chosen, why, and who is left out."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshnode.config import Objective, Split
from meshnode.errors import ResourceError, UsageError
from meshnode.pipeline.costs import PlanModel
from meshnode.pipeline.layers import parse_layers
from meshnode.pipeline.plan import Plan, PlanDevice, PlanNode, PlanRequest
from meshnode.pipeline.planner import is_worth_a_restart, make_plan
from meshnode.pipeline.predict import predict
from meshnode.pipeline.speeds import Link, Links, Speed
from tests.meshnode.pipeline.plans import GIB, KEPT, MIB, MODEL, lender, local, plan, ranges
from tests.meshnode.pipeline.test_any_plan import check

SLOW, FAST = 10e9, 100e9


def machine(name: str, size_bytes: int, rate: float = SLOW, *, gpu: bool = False) -> PlanNode:
    speed = Speed(rate, rate * 20)
    devices = [PlanDevice("D0", size_bytes, gpu, speed)]
    if name == "local":
        devices = [PlanDevice("CPU", size_bytes, False, speed)]
    return PlanNode(name, name == "local", tuple(devices))


def links(*names: str, rtt_s: float = 2e-3, rate: float = 1e8, **changes: Any) -> Links:
    pairs = itertools.permutations(("local", *names), 2)
    return Links({pair: Link(rtt_s, rate) for pair in pairs}, **changes)


def fastest(*nodes: PlanNode, model: PlanModel = MODEL, **changes: Any) -> Plan:
    names = [node.name for node in nodes if not node.is_local]
    fields: dict[str, Any] = {"links": links(*names), "ctx_tokens": 1024}
    return make_plan(PlanRequest(model, nodes, **(fields | changes)))


# -- where --------------------------------------------------------------------------------------


def test_alone_here_where_that_is_faster_and_the_plan_says_by_how_much() -> None:
    found = fastest(machine("local", 16 * GIB), machine("a", 16 * GIB))
    assert found.alone
    assert found.why == (
        "alone on local is faster: 12 against 11 tok/s over local and a, in proportion to memory",
        "by these figures nothing is faster",
    )
    assert found.left_out == (("a", "no faster than what is used, which has room for everything"),)


def test_alone_on_another_machine_where_that_is_faster() -> None:
    found = fastest(machine("local", 16 * GIB), machine("tower", 16 * GIB, FAST))
    assert ranges(found) == [("local", 0, 0, False), ("tower", 0, 8, True)]
    assert found.why[0].startswith("alone on tower is faster: 94 against 21")
    assert "tok/s alone on local" in found.why[1]


def test_the_fastest_machines_are_filled_first() -> None:
    found = fastest(
        machine("local", 300 * MIB), machine("a", 500 * MIB), machine("fast", 640 * MIB, FAST)
    )
    assert {s.node: s.n_layers for s in found.shares} == {"local": 2, "fast": 6}
    assert found.why[-2].startswith("no machine has room for all of it: 8")
    assert found.left_out == (("a", "no faster than what is used, which has room for everything"),)


def test_a_machine_far_away_is_left_out_where_the_others_have_room() -> None:
    far = {
        pair: replace(link, rtt_s=0.2) if "far" in pair else link
        for pair, link in links("a", "far").pairs.items()
    }
    nodes = machine("local", 500 * MIB), machine("a", 600 * MIB), machine("far", 900 * MIB, FAST)
    found = fastest(*nodes, links=Links(far))
    assert found.rpc_nodes == ("a",)
    assert found.left_out == (("far", "its hops would cost more than it saves: 199.0 ms a token"),)
    star = fastest(*nodes, links=Links(far, ring=False))
    assert star.left_out[0][1].endswith("200.0 ms a token")


def test_one_without_room_for_a_layer_is_left_out_for_that() -> None:
    found = fastest(machine("local", 16 * GIB), machine("tiny", 50 * MIB, FAST))
    assert found.left_out == (("tiny", "no room for a layer (100.0 MiB)"),)


def test_workers_are_put_in_the_order_of_the_shortest_ring() -> None:
    places = {"local": 0, "near": 1, "middle": 2, "end": 3}
    ring = {
        (one, other): Link(4e-3 * (places[other] - places[one]) % 16e-3 + 1e-3, 1e9)
        for one, other in itertools.permutations(places, 2)
    }
    nodes = [machine(name, 330 * MIB) for name in ("end", "near", "middle")]
    found = fastest(machine("local", 60 * MIB), *nodes, links=Links(ring))
    assert [share.node for share in found.shares if share.n_layers] == ["near", "middle", "end"]
    assert found.rpc_nodes == ("end", "near", "middle")
    assert found.device_order == ("RPC1", "RPC2", "RPC0")


def test_local_accelerators_hold_the_last_layers() -> None:
    gpu = PlanDevice("CUDA0", 450 * MIB, True, Speed(FAST, FAST * 20))
    here = replace(machine("local", 300 * MIB), devices=(gpu, *machine("local", 300 * MIB).devices))
    found = fastest(here, machine("a", 640 * MIB, FAST))
    assert ranges(found)[-1] == ("local", 6, 8, True)
    assert found.output.device == ""


# -- the output -----------------------------------------------------------------------------------


def test_the_output_stays_here_where_logits_would_take_longer() -> None:
    vocabulary = replace(MODEL, n_vocab=150_000)
    nodes = machine("local", 200 * MIB), machine("a", 16 * GIB)
    found = fastest(*nodes, model=vocabulary, output_may_stay=True)
    assert found.output.device == "CPU"
    assert "a token is 256 B on the wire instead of 585.9 KiB of logits" in found.output.why
    assert " tok/s)" in found.output.why
    small = replace(MODEL, n_vocab=300, output_bytes=150 * MIB)
    fast = machine("local", 400 * MIB), machine("a", 16 * GIB, FAST)
    assert fastest(*fast, model=small, output_may_stay=True).output.device == ""


def test_the_output_stays_here_where_nothing_else_has_room() -> None:
    wide = replace(MODEL, output_bytes=300 * MIB)
    nodes = machine("local", 325 * MIB), machine("a", 860 * MIB)
    found = fastest(*nodes, model=wide, output_may_stay=True)
    assert found.output.why == "the output stays here: elsewhere there is no room for it"
    with pytest.raises(ResourceError, match="does not fit on local, a"):
        fastest(*nodes, model=wide)


def test_an_output_that_has_no_room_here_goes_with_the_layers() -> None:
    wide = replace(MODEL, output_bytes=300 * MIB)
    nodes = machine("local", 100 * MIB), machine("a", 16 * GIB)
    found = fastest(*nodes, model=wide, output_may_stay=True)
    assert found.output.device == ""
    assert found.rpc_nodes == ("a",)


def test_a_tied_output_fits_where_it_is_there_once() -> None:
    tied = replace(MODEL, embedding_bytes=300 * MIB, output_bytes=300 * MIB, tied_bytes=300 * MIB)
    assert fastest(machine("local", 1200 * MIB), model=tied).alone
    assert fastest(machine("local", 1200 * MIB), machine("a", 100 * MIB), model=tied).alone
    much = machine("local", 16 * GIB), machine("a", 16 * GIB)
    assert fastest(*much, model=tied, output_may_stay=True).alone


# -- objectives -----------------------------------------------------------------------------------


def test_for_throughput_prompts_go_through_several_machines_at_once() -> None:
    nodes = [machine(name, 16 * GIB) for name in ("local", "a", "b")]
    one = fastest(*nodes, objective=Objective.LATENCY)
    many = fastest(*nodes, objective=Objective.THROUGHPUT, links=links("a", "b", rate=1e10))
    assert one.alone
    assert len(many.rpc_nodes) == 2
    request = PlanRequest(MODEL, tuple(nodes), ctx_tokens=1024, links=links("a", "b", rate=1e10))
    assert predict(request, many).crowd_tok_s > predict(request, one).crowd_tok_s
    assert predict(request, many).decode_tok_s < predict(request, one).decode_tok_s


def test_for_memory_every_machine_gives_the_same_part_of_what_it_has() -> None:
    nodes = machine("local", 2 * GIB), machine("a", 6 * GIB, FAST)
    found = fastest(*nodes, objective=Objective.MEMORY)
    assert {s.node: s.n_layers for s in found.shares} == {"local": 2, "a": 6}
    assert fastest(machine("local", 2 * GIB), objective=Objective.MEMORY).alone


def test_where_speeds_are_not_known_the_plan_is_what_it_always_was() -> None:
    nodes = local(400 * MIB), lender("a", 1200 * MIB)
    assert ranges(plan(*nodes)) == [("local", 0, 2, False), ("a", 2, 8, True)]
    assert plan(*nodes).why == ()
    partly = machine("local", 16 * GIB), lender("tower", 64 * GIB)
    assert fastest(*partly).why == ()


def test_asked_for_speed_the_unknown_is_assumed_and_told() -> None:
    nodes = local(16 * GIB), lender("a", 64 * GIB), lender("b", 64 * GIB)
    found = plan(*nodes, objective=Objective.LATENCY)
    assert found.rpc_nodes == ("a",)
    assert (
        "assumed, not measured: the speed of local, a and b and the link to a and b"
        in (found.why[-1])
    )
    known = machine("local", GIB), machine("a", GIB)
    assert (
        fastest(*known, links=Links(), objective=Objective.LATENCY)
        .why[-1]
        .endswith("assumed, not measured: the link to a")
    )


def test_a_link_of_which_only_the_delay_is_measured_decides_nothing() -> None:
    nodes = machine("local", 16 * GIB), machine("tower", 16 * GIB, FAST)
    half = {pair: replace(link, is_measured=False) for pair, link in links("tower").pairs.items()}
    assert fastest(*nodes, links=Links(half)).why == ()
    asked = fastest(*nodes, links=Links(half), objective=Objective.LATENCY)
    assert asked.why[-1].endswith("assumed, not measured: the rate of the link to tower")
    one_way = {**half, ("local", "tower"): Link(2e-3, 1e8)}
    assert fastest(*nodes, links=Links(one_way)).why == ()
    assert fastest(*nodes).rpc_nodes == ("tower",)


def test_figures_of_age_are_told() -> None:
    nodes = machine("local", 16 * GIB), machine("tower", 16 * GIB, FAST)
    aged = {pair: replace(link, age_s=900.0) for pair, link in links("tower").pairs.items()}
    why = fastest(*nodes, links=Links(aged)).why
    assert why[-1] == "by these figures nothing is faster; measured 15 min ago: the link to tower"


def test_where_the_output_computes_goes_by_the_measured_rate_of_the_way_home() -> None:
    wide = replace(MODEL, n_vocab=200_000, output_bytes=400 * MIB)
    nodes = local(1200 * MIB), lender("a", 1200 * MIB)
    fast = Links({("a", "local"): Link(1e-3, 1e10)})
    slow = Links({("a", "local"): Link(1e-3, 1e5)})
    assert plan(*nodes, model=wide, output_may_stay=True, links=slow).output.device == "CPU"
    assert plan(*nodes, model=wide, output_may_stay=True, links=fast).output.device == ""


def test_an_objective_and_a_layout_by_hand_exclude_each_other() -> None:
    nodes = machine("local", GIB), machine("a", GIB)
    with pytest.raises(UsageError, match="--for latency and a layout by hand exclude each other"):
        fastest(*nodes, objective=Objective.LATENCY, layers=parse_layers("local=0:output"))
    with pytest.raises(UsageError, match="--for memory and --split always exclude each other"):
        fastest(*nodes, objective=Objective.MEMORY, split=Split.ALWAYS)
    assert fastest(*nodes, objective=Objective.LATENCY, split=Split.NEVER).alone


def test_what_fits_nowhere_is_refused_as_ever() -> None:
    with pytest.raises(ResourceError, match="are missing; add a worker"):
        fastest(machine("local", 300 * MIB), machine("a", 300 * MIB))
    with pytest.raises(ResourceError, match="no room for the token embedding"):
        fastest(machine("local", 10 * MIB), machine("a", 16 * GIB))


def test_a_crowd_is_searched_and_what_was_not_tried_is_said() -> None:
    tall = replace(MODEL, layer_bytes=(100 * MIB,) * 40, memory=(KEPT,) * 40)
    crowd = [machine(f"n{n:02}", (250 + 70 * n) * MIB, SLOW * (1 + n % 7)) for n in range(12)]
    found = fastest(machine("local", 300 * MIB), *crowd, model=tall)
    assert "there are too many to try all" in found.why[-1]
    assert " machines, in proportion to memory" in found.why[0]


def test_a_machine_without_devices_is_left_out() -> None:
    bare = PlanNode("bare", False, ())
    found = fastest(machine("local", 16 * GIB), bare, objective=Objective.LATENCY)
    assert found.left_out == (("bare", "no room for a layer (100.0 MiB)"),)


@pytest.mark.parametrize("objective", [Objective.LATENCY, Objective.THROUGHPUT])
def test_a_model_that_computes_nothing_is_planned_all_the_same(objective: Objective) -> None:
    odd = replace(MODEL, n_nextn=8, output_bytes=0)
    nodes = [machine(name, 400 * MIB) for name in ("local", "a", "b", "c", "d", "e")]
    found = fastest(*nodes, model=odd, objective=objective, output_may_stay=True)
    assert found.shares
    request = PlanRequest(odd, tuple(nodes), ctx_tokens=1024)
    assert predict(request, found).decode_tok_s > 0


# -- whatever the machines ------------------------------------------------------------------------

RATES = st.floats(1e9, 1e12)
SIZES = st.integers(1, 2000).map(lambda mib: mib * MIB)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(SIZES, RATES), min_size=1, max_size=5),
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.sampled_from([Objective.LATENCY, Objective.THROUGHPUT]),
    st.booleans(),
)
def test_any_fastest_plan_covers_all_layers_once_within_memory(
    machines: list[tuple[int, float]], layers_mib: list[int], objective: Objective, stays: bool
) -> None:
    model = replace(
        MODEL,
        layer_bytes=tuple(size * MIB for size in layers_mib),
        memory=(KEPT,) * len(layers_mib),
    )
    names = ["local", *(f"n{number}" for number in range(1, len(machines)))]
    nodes = tuple(machine(n, *facts) for n, facts in zip(names, machines, strict=True))
    try:
        found = fastest(*nodes, model=model, objective=objective, output_may_stay=stays)
    except ResourceError:
        with pytest.raises(ResourceError):
            plan(*nodes, model=model, output_may_stay=stays)
        return
    if not found.output.device:
        check(found, nodes, model)
    assert found.why
    everyone = {*found.rpc_nodes, *(name for name, _ in found.left_out), "local"}
    assert everyone == set(names)


# -- a better plan later --------------------------------------------------------------------------


def test_a_little_faster_is_not_worth_a_restart() -> None:
    one, other = machine("local", 16 * GIB), machine("a", 16 * GIB, 1.1 * SLOW)
    much = machine("a", 16 * GIB, 3 * SLOW)

    def worth(there: PlanNode, **changes: Any) -> bool:
        fields: dict[str, Any] = {"links": links("a"), "ctx_tokens": 1024}
        request = PlanRequest(MODEL, (one, there), **(fields | changes))
        running = make_plan(replace(request, nodes=(one,), split=Split.NEVER, objective=None))
        return is_worth_a_restart(request, running, make_plan(request))

    assert not worth(other, objective=Objective.LATENCY)
    assert worth(much, objective=Objective.LATENCY)
    assert worth(other, objective=Objective.MEMORY)
    request = PlanRequest(MODEL, (one, other), ctx_tokens=1024, links=links("a"))
    elsewhere = make_plan(
        PlanRequest(MODEL, (one, machine("gone", GIB)), ctx_tokens=1024, split=Split.ALWAYS)
    )
    assert is_worth_a_restart(request, elsewhere, make_plan(request))
