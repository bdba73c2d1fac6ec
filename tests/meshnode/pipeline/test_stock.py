"""What is on workers' disks: what a plan would have them pull, and what that decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from meshnode.config import Objective, human_bytes
from meshnode.models.facts import ModelFacts
from meshnode.models.needs import needed_tensors
from meshnode.models.peers.source import PeerSource
from meshnode.models.spans import Span
from meshnode.models.store.slice import open_slice
from meshnode.models.store.store import Store
from meshnode.models.store.writer import SliceWriter
from meshnode.pipeline.costs import plan_model
from meshnode.pipeline.fastest import load_for
from meshnode.pipeline.holdings import ASK_S, ask_holdings, stock_of
from meshnode.pipeline.layers import parse_layers
from meshnode.pipeline.plan import Plan, PlanNode, PlanRequest
from meshnode.pipeline.planner import make_plan
from meshnode.pipeline.predict import plan_s, predict, storage_of
from meshnode.pipeline.speeds import PULL_BYTES_PER_S, Links
from meshnode.pipeline.stock import Stock
from tests.meshnode.models.store.slices import Whole, make_whole, pull
from tests.meshnode.pipeline.plans import ranges
from tests.meshnode.pipeline.test_fastest import links, machine
from tests.meshnode.pipeline.test_part import holder
from tunnels import PeerId

ANN, BEN = PeerId(bytes(31) + b"a"), PeerId(bytes(31) + b"b")
N_LAYERS = 12


class _Quiet(Whole):
    """Which tests that fail do not write out."""

    def __repr__(self) -> str:
        return "whole"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    made = make_whole(folder, layers=N_LAYERS, width=256, ffn=1024)
    return _Quiet(made.facts, made.manifest)


def blocks(whole: Whole, start: int, stop: int, *further: str) -> frozenset[str]:
    parts = (*(f"blk.{layer}." for layer in range(start, stop)), *further)
    return frozenset(name for name in whole.all_names if name.startswith(parts))


def size_of(facts: ModelFacts, names: Sequence[str] | frozenset[str]) -> int:
    return sum(tensor.nbytes for tensor in facts.tensors if tensor.name in names)


def request(whole: Whole, nodes: Sequence[PlanNode], **changes: Any) -> PlanRequest:
    others = [node.name for node in nodes if not node.is_local]
    fields: dict[str, Any] = {"ctx_tokens": 64, "links": links(*others)}
    return PlanRequest(plan_model(whole.facts), tuple(nodes), **(fields | changes))


def small(name: str, layers: int, rate: float = 1e9) -> PlanNode:
    """With room for so many layers of this model and its output, besides the buffers."""
    fixed_bytes = 2_800_000 if name == "local" else 100_000
    return machine(name, 5_900_000 + fixed_bytes + 1_380_000 * layers, rate)


# -- what is missing ------------------------------------------------------------------------------


def test_what_each_node_lacks_of_its_share_is_counted_and_told(whole: Whole) -> None:
    held = {"local": blocks(whole, 0, 2, "token_embd"), "tower": blocks(whole, 2, 7)}
    stock = Stock(whole.facts, held, "local")
    by_hand = parse_layers("local=0:1,tower=2:7,attic=8:output")
    nodes = [machine(name, 2**33) for name in ("local", "tower", "attic")]
    asked = request(whole, nodes, layers=by_hand, stock=stock)
    plan = make_plan(asked)
    lacking = blocks(whole, 7, 8), blocks(whole, 8, 12, "output")
    tower_bytes, attic_bytes = (size_of(whole.facts, names) for names in lacking)
    missing = {node: kept.missing_bytes for node, kept in storage_of(asked, plan).items()}
    assert missing == {"local": 0, "tower": tower_bytes, "attic": attic_bytes}
    assert plan.why[:2] == (
        "local holds all of its layers already",
        "tower holds 5 of its 6 layers already",
    )
    whole_bytes = human_bytes(tower_bytes + attic_bytes)
    most = f"{human_bytes(attic_bytes)} of it by attic"
    assert plan.why[2] == f"{whole_bytes} are to be pulled, {most}"
    nobody = replace(asked, stock=None)
    slower_s = predict(asked, plan).ready_s - predict(nobody, plan).ready_s
    assert slower_s == pytest.approx(attic_bytes / PULL_BYTES_PER_S, rel=0.05)
    assert make_plan(nobody).why == ()


def test_many_who_hold_something_are_counted_instead_of_named(whole: Whole) -> None:
    names = ("local", "a", "b", "c", "d")
    by_hand = parse_layers("local=0:1,a=2:3,b=4:5,c=6:7,d=8:output")
    held = {name: blocks(whole, 2 * at, 2 * at + 2) for at, name in enumerate(names)}
    nodes = [machine(name, 2**33) for name in names]
    asked = request(whole, nodes, layers=by_hand, stock=Stock(whole.facts, held, "local"))
    assert make_plan(asked).why[0] == "5 machines hold layers of theirs already"


def test_what_a_bare_server_is_sent_is_pulled_by_the_one_that_sends_it(whole: Whole) -> None:
    held = {"local": blocks(whole, 0, 12)}
    stock = Stock(whole.facts, held, "local", bare={"10.0.0.1:50052"})
    by_hand = parse_layers("local=0:1,10.0.0.1:50052=2:output")
    nodes = [machine("local", 2**33), machine("10.0.0.1:50052", 2**33)]
    plan = make_plan(request(whole, nodes, layers=by_hand, stock=stock))
    ends = size_of(whole.facts, blocks(whole, 0, 0, "token_embd", "output"))
    assert stock.missing_bytes(plan.shares) == {"local": ends}


async def test_who_does_not_say_what_it_holds_in_time_counts_as_holding_nothing(
    whole: Whole, tmp_path: Path, autojump_clock: MockClock
) -> None:
    store = Store(tmp_path / "models")
    part = whole.create(store)
    with SliceWriter(part.folder) as writer:
        pull(writer, whole, whole.names("token_embd"))
    part = open_slice(part.folder)
    theirs = blocks(whole, 3, 5)

    async def ask(peer: PeerId, identity: str) -> PeerSource | None:
        assert identity == part.identity.provisional
        if peer == BEN:
            await trio.sleep_forever()
        return holder(whole, peer, list(theirs))

    held = await ask_holdings(ask, part.identity.provisional, {"ann": ANN, "ben": BEN})
    assert trio.current_time() == pytest.approx(ASK_S)
    stock = stock_of(part, "local", held)
    assert stock.held == {"local": set(whole.names("token_embd")), "ann": theirs}
    cut = {"ann": [Span(one.file_index, one.start, one.stop - 1) for one in held["ann"]]}
    assert set(stock_of(part, "local", cut).held["ann"]) < theirs, "a tensor cut short is none"


# -- what it decides ------------------------------------------------------------------------------


def layers_of(whole: Whole, plan: Plan) -> dict[str, frozenset[str]]:
    """What every node holds once this plan has run."""
    return {
        node: frozenset(names) for node, names in needed_tensors(whole.facts, plan.shares).items()
    }


def pulled_bytes(asked: PlanRequest, plan: Plan) -> int:
    return sum(kept.missing_bytes for kept in storage_of(asked, plan).values())


def test_of_two_that_are_alike_each_keeps_the_layers_that_it_holds(whole: Whole) -> None:
    nodes = [small("local", 0, 1e7), small("attic", 7), small("tower", 7)]
    first = make_plan(request(whole, nodes))
    assert [share.node for share in first.shares[1:]] == ["attic", "tower"]
    swap = {"local": "local", "attic": "tower", "tower": "attic"}
    held = {swap[node]: names for node, names in layers_of(whole, first).items()}
    asked = request(whole, nodes, stock=Stock(whole.facts, held, "local"))
    found = make_plan(asked)
    assert [share.node for share in found.shares[1:]] == ["tower", "attic"]
    assert pulled_bytes(asked, found) == 0
    assert "as fast as the fastest, for which" in "\n".join(found.why)
    assert found.why[-1] == "nothing is to be pulled"


def test_a_layer_more_room_on_a_second_start_moves_no_layer(whole: Whole) -> None:
    nodes = [small("local", 0, 1e7), small("attic", 6, 1.0e9), small("tower", 9, 1.1e9)]
    first = make_plan(request(whole, nodes))
    stock = Stock(whole.facts, layers_of(whole, first), "local")
    roomier = [nodes[0], small("attic", 7, 1.02e9), small("tower", 10, 1.1e9)]
    assert ranges(make_plan(request(whole, roomier))) != ranges(first), "without knowing"
    asked = request(whole, roomier, stock=stock)
    assert ranges(make_plan(asked)) == ranges(first)
    assert pulled_bytes(asked, make_plan(asked)) == 0


def test_who_holds_all_of_it_is_left_for_what_is_much_faster(whole: Whole) -> None:
    nodes = [small("local", 0, 1e7), small("slow", 20, 1e9), small("fast", 20, 1.2e9)]
    held = {"slow": frozenset(whole.all_names)}
    asked = request(whole, nodes, stock=Stock(whole.facts, held, "local"))
    assert make_plan(asked).rpc_nodes == ("fast",)
    close = request(whole, [*nodes[:2], small("fast", 20, 1.03e9)], stock=asked.stock)
    kept = make_plan(close)
    assert kept.rpc_nodes == ("slow",)
    assert dict(kept.left_out)["fast"] == "what is used holds more of the model, and is as fast"
    assert "% faster, but" in "\n".join(kept.why)


def test_by_memory_disks_decide_nothing(whole: Whole) -> None:
    nodes = [small("local", 4, 1e9), small("attic", 7), small("tower", 7)]
    held = {"tower": blocks(whole, 0, 12)}
    for objective in (Objective.MEMORY, None):
        plain = request(whole, nodes, objective=objective, links=Links())
        knowing = replace(plain, stock=Stock(whole.facts, held, "local"))
        assert ranges(make_plan(knowing)) == ranges(make_plan(plain))


@given(
    rates=st.lists(st.floats(0.5e9, 4e9), min_size=2, max_size=3),
    rooms=st.lists(st.integers(2, 13), min_size=3, max_size=3),
    spans=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=4, max_size=4),
    objective=st.sampled_from([Objective.LATENCY, Objective.THROUGHPUT]),
    stays=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_whatever_is_held_a_plan_moves_no_more_and_takes_hardly_longer(
    whole: Whole,
    rates: list[float],
    rooms: list[int],
    spans: list[tuple[int, int]],
    objective: Objective,
    *,
    stays: bool,
) -> None:
    names = ["n1", "n2", "n3"][: len(rates)]
    workers = [small(*given) for given in zip(names, rooms, rates, strict=False)]
    nodes = [small("local", 12, 0.7e9), *workers]
    held = {
        node.name: blocks(whole, *span, "output") for node, span in zip(nodes, spans, strict=False)
    }
    plain = request(whole, nodes, objective=objective, output_may_stay=stays)
    asked = replace(plain, stock=Stock(whole.facts, held, "local"))
    fastest, chosen = make_plan(plain), make_plan(asked)
    load = load_for(objective)
    assert plan_s(plain, chosen, load) <= 1.0501 * plan_s(plain, fastest, load)
    assert pulled_bytes(asked, chosen) <= pulled_bytes(asked, fastest)
