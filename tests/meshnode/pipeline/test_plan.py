"""Which node gets which layers by rule, and what llama-server is told of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.config import Split
from meshnode.errors import ResourceError, UsageError
from meshnode.pipeline.placing import MAX_DEVICES
from meshnode.pipeline.plan import PlanDevice, PlanNode
from tests.meshnode.pipeline.plans import GIB, KEPT, MIB, MODEL, TINY, lender, local, plan, ranges

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
    model = replace(TINY, layer_bytes=(1000,) * 2, memory=(KEPT,) * 2)
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


@pytest.mark.parametrize("count", [20, MAX_DEVICES])
def test_a_crowd_of_workers_gets_a_layer_each(count: int) -> None:
    tall = replace(MODEL, layer_bytes=(100 * MIB,) * 80, memory=(KEPT,) * 80)
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
