"""Which node gets which layers, and what llama-server is told of it."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshnode.config import Split
from meshnode.errors import ResourceError, UsageError
from meshnode.pipeline.costs import PlanModel, costs_of
from meshnode.pipeline.layers import parse_layers, parse_tensor_split
from meshnode.pipeline.plan import Plan, PlanDevice, PlanNode, PlanRequest, Share
from meshnode.pipeline.planner import MAX_DEVICES, make_plan

MIB = 2**20
GIB = 2**30

# Eight layers of 100 MiB, 20 MiB at both ends.
MODEL = PlanModel(
    name="glm",
    layer_bytes=(100 * MIB,) * 8,
    embedding_bytes=20 * MIB,
    output_bytes=20 * MIB,
    other_bytes=0,
    kv_bytes_per_token_per_layer=(1024,) * 8,
    n_embd=64,
    n_attn=64,
    n_ff=128,
    n_vocab=1000,
)


def local(cpu_bytes: int = 16 * GIB, *gpus_bytes: int) -> PlanNode:
    gpus = [PlanDevice(f"CUDA{n}", size, True) for n, size in enumerate(gpus_bytes)]
    return PlanNode("local", True, (*gpus, PlanDevice("CPU", cpu_bytes, False)))


def lender(name: str, *sizes_bytes: int, gpu: bool = True) -> PlanNode:
    devices = [PlanDevice(f"D{n}", size, gpu) for n, size in enumerate(sizes_bytes)]
    return PlanNode(name, False, tuple(devices))


def plan(*nodes: PlanNode, model: PlanModel = MODEL, ctx: int = 1024, **changes: Any) -> Plan:
    fields: dict[str, Any] = {"model": model, "nodes": nodes, "ctx_tokens": ctx}
    return make_plan(PlanRequest(**(fields | changes)))


def by_hand(text: str, *nodes: PlanNode) -> Plan:
    return plan(*nodes, layers=parse_layers(text))


def ranges(plan: Plan) -> list[tuple[str, int, int, bool]]:
    return [(s.node, s.first_layer, s.last_layer, s.has_output) for s in plan.shares]


# -- alone ------------------------------------------------------------------------------------


def test_a_model_that_fits_on_the_orchestrator_runs_there_alone() -> None:
    found = plan(local(), lender("big", 64 * GIB))
    assert found.alone
    assert ranges(found) == [("local", 0, 8, True)]
    assert (found.gpu_layers, found.tensor_split, found.device_order) == (0, (), ())
    assert found.rpc_nodes == ()


def test_alone_the_accelerators_take_what_they_can_and_the_cpu_the_rest() -> None:
    found = plan(local(16 * GIB, 350 * MIB, 350 * MIB))
    assert found.alone
    assert ranges(found) == [
        ("local", 0, 2, False),
        ("local", 2, 5, False),
        ("local", 5, 8, True),
    ]
    assert (found.gpu_layers, found.tensor_split) == (7, (3, 4))
    assert found.device_order == ("CUDA0", "CUDA1")


def test_an_accelerator_that_holds_all_leaves_the_cpu_its_embedding() -> None:
    found = plan(local(16 * GIB, 16 * GIB))
    assert ranges(found) == [("local", 0, 0, False), ("local", 0, 8, True)]
    assert found.gpu_layers == 9
    assert found.shares[0].weight_bytes == 20 * MIB


def test_accelerators_too_small_for_anything_are_left_out() -> None:
    found = plan(local(16 * GIB, 1 * MIB))
    assert (found.gpu_layers, found.device_order) == (0, ())
    assert ranges(found) == [("local", 0, 8, True)]


def test_a_tied_output_is_counted_once_where_all_lies_on_one_cpu() -> None:
    tied = replace(MODEL, embedding_bytes=300 * MIB, output_bytes=300 * MIB, tied_bytes=300 * MIB)
    found = plan(local(), model=tied)
    assert sum(share.weight_bytes for share in found.shares) == 1100 * MIB
    assert plan(local(1200 * MIB), model=tied).alone
    spread = plan(local(), lender("a", 16 * GIB), model=tied, split=Split.ALWAYS)
    assert sum(share.weight_bytes for share in spread.shares) == 1400 * MIB


# -- spread -----------------------------------------------------------------------------------


def test_what_does_not_fit_alone_is_spread_in_proportion_to_memory() -> None:
    found = plan(local(400 * MIB), lender("a", 1200 * MIB))
    assert not found.alone
    assert ranges(found) == [("local", 0, 2, False), ("a", 2, 8, True)]
    assert (found.gpu_layers, found.tensor_split, found.device_order) == (7, (7,), ("RPC0",))
    assert found.rpc_nodes == ("a",)


def test_every_share_fits_and_none_is_fuller_than_it_must_be() -> None:
    sizes = {"local": 500 * MIB, "a": 600 * MIB, "b": 300 * MIB}
    found = plan(local(500 * MIB), lender("a", 600 * MIB), lender("b", 300 * MIB))
    assert {s.node: s.n_layers for s in found.shares} == {"local": 3, "a": 4, "b": 1}
    assert all(share.total_bytes <= sizes[share.node] for share in found.shares)


def test_the_logits_come_off_a_local_accelerator_where_there_is_one() -> None:
    found = plan(local(100 * MIB, 500 * MIB), lender("a", 600 * MIB))
    assert ranges(found) == [
        ("local", 0, 0, False),
        ("a", 0, 5, False),
        ("local", 5, 8, True),
    ]
    assert found.device_order == ("RPC0", "CUDA0")
    assert found.tensor_split == (5, 4)


def test_the_local_cpu_helps_out_when_accelerators_everywhere_are_too_small() -> None:
    found = plan(local(400 * MIB, 300 * MIB), lender("a", 400 * MIB))
    assert ranges(found) == [
        ("local", 0, 3, False),
        ("a", 3, 6, False),
        ("local", 6, 8, True),
    ]
    assert found.gpu_layers == 6


def test_devices_of_a_lender_are_numbered_used_or_not() -> None:
    a = PlanNode(
        "a",
        False,
        (PlanDevice("CPU", 9 * GIB, False), PlanDevice("M0", GIB, True)),
    )
    found = plan(local(200 * MIB), a, lender("b", GIB, GIB), split=Split.ALWAYS)
    assert found.device_order == ("RPC1", "RPC2", "RPC3")
    assert found.rpc_nodes == ("a", "b")
    assert {share.device for share in found.shares if share.node == "a"} == {"M0"}


def test_a_lender_that_gets_nothing_is_not_connected() -> None:
    found = plan(local(600 * MIB), lender("tiny", 20 * MIB), lender("a", 600 * MIB))
    assert found.rpc_nodes == ("a",)
    assert found.device_order == ("RPC0",)


def test_a_lender_with_only_a_cpu_lends_that() -> None:
    found = plan(local(600 * MIB), lender("a", 600 * MIB, gpu=False))
    assert found.rpc_nodes == ("a",)


def test_an_orchestrator_too_small_for_a_layer_gives_all_away() -> None:
    for split in (Split.AUTO, Split.ALWAYS):
        found = plan(local(60 * MIB), lender("a", 16 * GIB), split=split)
        assert ranges(found) == [("local", 0, 0, False), ("a", 0, 8, True)]
        assert found.gpu_layers == 9


# -- always and never -------------------------------------------------------------------------

TINY = replace(MODEL, layer_bytes=(1000,) * 8, embedding_bytes=1000, output_bytes=1000, n_vocab=300)


def test_always_gives_every_node_a_layer_even_of_a_tiny_model() -> None:
    found = plan(
        local(64 * GIB),
        lender("a", 50 * MIB),
        lender("b", 16 * GIB),
        lender("c", 50 * MIB),
        model=TINY,
        split=Split.ALWAYS,
    )
    assert [share.node for share in found.shares] == ["local", "a", "b", "c"]
    assert all(share.n_layers >= 1 for share in found.shares)
    assert sum(share.n_layers for share in found.shares) == 8


def test_always_leaves_the_smallest_lenders_out_where_layers_are_too_few() -> None:
    model = replace(TINY, layer_bytes=(1000,) * 2, kv_bytes_per_token_per_layer=(1024,) * 2)
    found = plan(
        local(GIB),
        lender("a", GIB),
        lender("b", 2 * GIB),
        model=model,
        split=Split.ALWAYS,
    )
    assert ranges(found) == [("local", 0, 1, False), ("b", 1, 2, True)]


def test_always_leaves_out_a_lender_without_room_for_a_layer() -> None:
    found = plan(local(), lender("a", 20 * MIB), lender("b", GIB), split=Split.ALWAYS)
    assert found.rpc_nodes == ("b",)


def test_always_with_an_accelerator_gives_its_node_a_layer_too() -> None:
    found = plan(local(GIB, GIB), lender("a", GIB), model=TINY, split=Split.ALWAYS)
    assert [share.node for share in found.shares if share.n_layers] == ["a", "local"]


def test_always_needs_somebody_to_lend() -> None:
    with pytest.raises(ResourceError, match="mesh worker"):
        plan(local(), split=Split.ALWAYS)
    with pytest.raises(ResourceError, match="no lender has room for a layer of glm"):
        plan(local(), lender("a", 1 * MIB), split=Split.ALWAYS)


def test_never_runs_alone_or_not_at_all() -> None:
    assert plan(local(), lender("a", 16 * GIB), split=Split.NEVER).alone
    with pytest.raises(ResourceError, match=r"does not fit on local: [\d.]+ MiB are missing"):
        plan(local(400 * MIB), lender("a", 16 * GIB), split=Split.NEVER)


@pytest.mark.parametrize("count", sorted({min(20, MAX_DEVICES), MAX_DEVICES}))
def test_a_crowd_of_workers_gets_a_layer_each(count: int) -> None:
    tall = replace(MODEL, layer_bytes=(100 * MIB,) * 80, kv_bytes_per_token_per_layer=(1024,) * 80)
    crowd = [lender(f"n{n:02}", 4 * GIB) for n in range(count)]
    found = plan(local(4 * GIB), *crowd, model=tall, split=Split.ALWAYS)
    assert found.rpc_nodes == tuple(node.name for node in crowd)
    assert found.device_order == tuple(f"RPC{n}" for n in range(count))
    assert min(found.tensor_split) >= 1
    assert sum(share.n_layers for share in found.shares) == 80


def test_no_more_devices_than_llama_cpp_takes() -> None:
    many = [lender(f"n{n:02}", (100 + n) * GIB) for n in range(MAX_DEVICES + 3)]
    found = plan(local(60 * MIB), *many, model=replace(MODEL, layer_bytes=(20 * GIB,) * 8))
    assert len(found.device_order) <= MAX_DEVICES
    assert "n00" not in found.rpc_nodes


# -- too small --------------------------------------------------------------------------------


def test_what_fits_nowhere_is_refused_with_the_missing_bytes() -> None:
    with pytest.raises(ResourceError) as refused:
        plan(local(300 * MIB), lender("a", 300 * MIB))
    assert "glm with a context of 1024 tokens does not fit on local, a" in str(refused.value)
    assert "MiB are missing" in str(refused.value)
    assert refused.value.exit_code == 7
    with pytest.raises(ResourceError, match="does not fit on local:"):
        plan(local(300 * MIB, 100 * MIB))


def test_an_orchestrator_without_room_for_the_embedding_is_told() -> None:
    with pytest.raises(ResourceError, match="no room for the token embedding of glm"):
        plan(local(10 * MIB), lender("a", 16 * GIB))


def test_a_larger_context_takes_more_memory() -> None:
    nodes = (local(600 * MIB), lender("a", 600 * MIB))
    assert not plan(*nodes).alone
    with pytest.raises(ResourceError, match="smaller --ctx"):
        plan(*nodes, ctx=128 * 1024)
    small = plan(local(), ctx=4096, kv_type="q8_0").shares[0].kv_bytes
    assert small == plan(local(), ctx=4096).shares[0].kv_bytes * 34 // 64


def test_an_unknown_cache_type_is_told() -> None:
    with pytest.raises(UsageError, match="'f12' is no type"):
        plan(local(), kv_type="f12")


# -- by hand ----------------------------------------------------------------------------------


def test_a_layout_by_hand_is_taken_as_it_is() -> None:
    found = by_hand("local=0:3,a=4:output", local(), lender("a", GIB))
    assert ranges(found) == [("local", 0, 4, False), ("a", 4, 8, True)]
    assert (found.gpu_layers, found.tensor_split) == (5, (5,))


def test_the_output_goes_with_the_last_layer_unless_it_is_named() -> None:
    assert ranges(by_hand("a=4:7,local=0:3", local(), lender("a", GIB)))[-1] == ("a", 4, 8, True)
    found = by_hand("a=0:7,b=output", local(), lender("a", GIB), lender("b", GIB))
    assert ranges(found) == [
        ("local", 0, 0, False),
        ("a", 0, 8, False),
        ("b", 8, 8, True),
    ]
    assert found.tensor_split == (8, 1)


def test_lenders_may_stand_in_any_order() -> None:
    found = by_hand("b=0:3,a=4:output", local(), lender("a", GIB), lender("b", GIB))
    assert found.rpc_nodes == ("a", "b")
    assert found.device_order == ("RPC1", "RPC0")


def test_all_by_hand_on_the_local_cpu_is_alone() -> None:
    found = by_hand("local=0:output", local(), lender("a", GIB))
    assert found.alone
    assert found.gpu_layers == 0


def test_a_nodes_range_is_spread_over_its_devices() -> None:
    found = by_hand("local=0:1,a=2:output", local(), lender("a", 400 * MIB, 600 * MIB))
    assert [share.n_layers for share in found.shares] == [2, 2, 4]


def test_a_local_accelerator_may_hold_a_middle_range() -> None:
    found = by_hand(
        "a=0:2,local=3:5,b=6:output", local(GIB, GIB), lender("a", GIB), lender("b", GIB)
    )
    assert found.device_order == ("RPC0", "CUDA0", "RPC1")
    assert [share.n_layers for share in found.shares] == [0, 3, 3, 2]


def test_a_first_range_too_large_for_the_local_accelerator_spills_to_the_cpu() -> None:
    found = by_hand("local=0:5,a=6:output", local(GIB, 350 * MIB), lender("a", GIB))
    assert ranges(found)[:2] == [("local", 0, 3, False), ("local", 3, 6, False)]
    with pytest.raises(ResourceError, match="local has no room"):
        by_hand("a=0:1,local=2:output", local(GIB, 350 * MIB), lender("a", GIB))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a=0:2,local=3:5,b=6:output", "llama.cpp puts those of the local CPU first"),
        ("a=0:6,local=7:output", "llama.cpp puts those of the local CPU first"),
        ("local=0:2,a=4:output", "leaves out layer 3"),
        ("local=0:2,a=3:5", "leaves out layer 6"),
        ("local=0:4,a=4:output", "layer 4 to two nodes"),
        ("local=0:3,c=4:output", "'c', which is no node here: there are local, a, b"),
        ("local=0:3,a=4:9", "a cannot have 4:9: the model's layers are 0 to 7"),
        ("local=0:3,a=4:8", "a cannot have 4:8"),
        ("local=5:3,a=4:output", "local cannot have 5:3"),
        ("local=0:7,a=output:3", "a cannot have output:3"),
        ("local=0:1,a=2:3,local=4:output", "names a node twice"),
        ("local", "no range: write it like"),
        ("local=0-3", "no range"),
        ("local=0:3,,a=4:output", "'' is no range"),
        ("=0:3", "no range"),
    ],
)
def test_a_layout_that_cannot_be_placed_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        by_hand(text, local(), lender("a", GIB), lender("b", GIB))


def test_a_layout_that_does_not_fit_is_refused_with_the_missing_bytes() -> None:
    with pytest.raises(ResourceError, match=r"a has no room for the layers .* MiB are missing"):
        by_hand("local=0:1,a=2:output", local(), lender("a", 400 * MIB))
    with pytest.raises(ResourceError, match="local has no room"):
        by_hand("local=0:6,a=7:output", local(300 * MIB), lender("a", 400 * MIB))


def test_too_many_devices_by_hand_are_refused() -> None:
    many = lender("a", *[GIB] * (MAX_DEVICES + 1))
    big = replace(
        MODEL,
        layer_bytes=(900 * MIB,) * (MAX_DEVICES + 5),
        kv_bytes_per_token_per_layer=(1024,) * (MAX_DEVICES + 5),
    )
    with pytest.raises(UsageError, match=f"{MAX_DEVICES} devices at most"):
        plan(
            local(16 * GIB),
            many,
            model=big,
            layers=parse_layers("local=0:4,a=5:output"),
        )


def test_a_tensor_split_gives_layers_in_proportion() -> None:
    nodes = (local(), lender("a", GIB), lender("b", GIB))
    found = plan(*nodes, tensor_split=parse_tensor_split("2,1,1"))
    assert [share.n_layers for share in found.shares] == [4, 2, 2]
    found = plan(*nodes, tensor_split=parse_tensor_split("0, 1, 1"))
    assert ranges(found) == [
        ("local", 0, 0, False),
        ("a", 0, 4, False),
        ("b", 4, 8, True),
    ]
    found = plan(*nodes, tensor_split=parse_tensor_split("1,1,1"))
    assert sorted(share.n_layers for share in found.shares) == [2, 3, 3]


@pytest.mark.parametrize("text", ["", "a", "1,-1", "0,0", "nan,1", "inf,1", "1e308,1e308"])
def test_a_tensor_split_that_is_none_is_told(text: str) -> None:
    with pytest.raises(UsageError, match="--tensor-split"):
        parse_tensor_split(text)


def test_a_tensor_split_has_a_number_for_each_node() -> None:
    with pytest.raises(UsageError, match="2 numbers for 3 nodes"):
        plan(local(), lender("a", GIB), lender("b", GIB), tensor_split=(1.0, 1.0))


def test_overrides_that_contradict_each_other_are_refused() -> None:
    layers = parse_layers("local=0:3,a=4:output")
    nodes = (local(), lender("a", GIB))
    with pytest.raises(UsageError, match="exclude each other"):
        plan(*nodes, layers=layers, tensor_split=(1.0, 1.0))
    with pytest.raises(UsageError, match="--split never"):
        plan(*nodes, layers=layers, split=Split.NEVER)


# -- whatever comes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nodes",
    [
        (),
        (lender("a", GIB),),
        (local(), local()),
        (PlanNode("local", True, ()),),
        (local(), lender("a", GIB), lender("a", GIB)),
    ],
)
def test_nodes_that_cannot_be_are_a_mistake_of_the_caller(nodes: tuple[PlanNode, ...]) -> None:
    with pytest.raises(ValueError):
        plan(*nodes)


SIZES = st.integers(1, 2000).map(lambda mib: mib * MIB)
LENDERS = st.lists(st.lists(SIZES, min_size=1, max_size=3), max_size=5).map(
    lambda rows: [lender(f"n{index}", *row) for index, row in enumerate(rows)]
)


@settings(max_examples=300, deadline=None)
@given(
    st.tuples(SIZES, st.lists(SIZES, max_size=2)),
    LENDERS,
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.sampled_from(Split),
)
def test_any_plan_covers_all_layers_once_within_memory(
    here: tuple[int, list[int]], lenders: list[PlanNode], layers_mib: list[int], split: Split
) -> None:
    model = replace(
        MODEL,
        layer_bytes=tuple(size * MIB for size in layers_mib),
        kv_bytes_per_token_per_layer=(1024,) * len(layers_mib),
    )
    nodes = (local(here[0], *here[1]), *lenders)
    try:
        found = plan(*nodes, model=model, split=split)
    except ResourceError:
        return
    check(found, nodes, model)
    if split is Split.ALWAYS:
        assert not found.alone
        assert all(
            any(s.node == name and s.n_layers for s in found.shares) for name in found.rpc_nodes
        )
    if split is Split.NEVER:
        assert found.alone


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_any_proportions_give_all_layers_away(n_layers: int, proportions: list[int]) -> None:
    assume(sum(proportions))
    model = replace(
        TINY,
        layer_bytes=(1000,) * n_layers,
        kv_bytes_per_token_per_layer=(1,) * n_layers,
    )
    nodes = (local(), *(lender(f"n{n}", GIB) for n in range(len(proportions) - 1)))
    found = plan(*nodes, model=model, tensor_split=tuple(map(float, proportions)))
    check(found, nodes, model)


def check(found: Plan, nodes: tuple[PlanNode, ...], model: PlanModel) -> None:
    """What holds for every plan: all layers once and in order, within memory, and the figures for
    llama-server say the same as the shares."""
    shares: tuple[Share, ...] = found.shares
    assert shares[0].first_layer == 0
    for before, after in itertools.pairwise(shares):
        assert before.last_layer == after.first_layer
    assert shares[-1].last_layer == model.n_layers
    assert [share.has_output for share in shares] == [False] * (len(shares) - 1) + [True]
    usable = {(n.name, d.name): d.usable_bytes for n in nodes for d in n.devices}
    assert all(share.total_bytes <= usable[share.node, share.device] for share in shares)
    on_cpu = shares[0].n_layers + shares[0].has_output
    assert found.gpu_layers == sum(found.tensor_split) == model.n_layers + 1 - on_cpu
    assert len(found.device_order) == len(found.tensor_split) == len(shares) - 1
    assert len(set(found.device_order)) == len(found.device_order)
    weights = sum(share.weight_bytes for share in shares)
    assert weights == sum(model.layer_bytes) + model.embedding_bytes + model.output_bytes
    costs = costs_of(model, ctx_tokens=1024, slots=1, kv_type="f16")
    assert sum(share.kv_bytes for share in shares) == sum(item.kv_bytes for item in costs.items)
