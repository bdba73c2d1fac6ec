"""What holds for every plan, whatever the nodes and the model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshnode.config import Split
from meshnode.errors import ResourceError
from meshnode.models.kv import LayerMemory
from meshnode.pipeline.costs import PlanModel, costs_of
from meshnode.pipeline.plan import Plan, PlanNode, Share
from tests.meshnode.pipeline.plans import GIB, KEPT, MIB, MODEL, TINY, lender, local, plan


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
        memory=(KEPT,) * len(layers_mib),
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
        memory=(LayerMemory(),) * n_layers,
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
