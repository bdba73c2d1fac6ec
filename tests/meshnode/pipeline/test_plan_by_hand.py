"""Layouts that the user says: layer by layer, or by proportion."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.config import Split
from meshnode.errors import ResourceError, UsageError
from meshnode.pipeline.layers import parse_layers, parse_tensor_split
from meshnode.pipeline.placing import MAX_DEVICES
from tests.meshnode.pipeline.plans import (
    GIB,
    KEPT,
    MIB,
    MODEL,
    by_hand,
    lender,
    local,
    plan,
    ranges,
)


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
        ("local=0:2,a=4:output", "--layers local=0:2,a=4:output leaves out layer 3"),
        ("local=0:2,a=3:5", "leaves out layer 6"),
        ("local=0:4,a=4:output", "layer 4 to two nodes"),
        ("a=0:output,b=output", r"--layers a=0:output,b=output gives the output to two nodes"),
        ("a=output", "--layers a=output leaves out layer 0"),
        ("local=0:3,c=4:output", r"3,\[c=4:output\]: 'c' is no node here: there are local, a, b"),
        ("local=0:3,a=4:9", "a cannot have 4:9: the model's layers are 0 to 7"),
        ("local=0:3,a=4:8", "a cannot have 4:8"),
        ("local=5:3,a=4:output", "local cannot have 5:3"),
        ("local=0:7,a=output:3", "a cannot have output:3"),
        ("local=0:1,a=2:3,local=4:output", "names a node twice"),
        ("local", "no range: write it like"),
        ("local=0-3", "no range"),
        ("local=0:3,,a=4:output", "'' is no range"),
        ("=0:3", "no range"),
        ("", "'' is no range"),
        ("local=\u0660:\u0667", "no range"),
        ("local=0:99999999999999999999", "no range"),
    ],
)
def test_a_layout_that_cannot_be_placed_is_refused_with_the_reason(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        by_hand(text, local(), lender("a", GIB), lender("b", GIB))


def test_an_output_that_stays_is_given_to_nobody_else() -> None:
    ranges = parse_layers("local=0:7,a=output,local=output")
    with pytest.raises(UsageError, match=r"a=output,local=output gives the output to two nodes"):
        plan(local(), lender("a", GIB), layers=ranges, output_may_stay=True)


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
        memory=(KEPT,) * (MAX_DEVICES + 5),
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
