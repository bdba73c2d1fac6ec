"""The memory of each piece, by arithmetic; `tests/engine/test_placement.py` asks the engine."""

from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.errors import UsageError
from meshnode.models.facts import read_facts
from meshnode.models.kv import Cells, LayerMemory
from meshnode.pipeline.costs import PlanModel, costs_of, plan_model
from tests.engine.synthetic import make_model


def test_a_models_facts_become_its_costs(tmp_path: Path) -> None:
    facts = read_facts(make_model(tmp_path / "m.gguf", layers=3, width=256, vocab=512, heads=4))
    model = plan_model(facts)
    costs = costs_of(model, ctx_tokens=1024, slots=1, kv_type="f16")
    assert model.n_layers == 3
    assert [item.weight_bytes for item in costs.items[:3]] == list(facts.layer_bytes)
    assert costs.items[0].kv_bytes == 1024 * 2 * 256 * 2
    assert costs.items[3].weight_bytes == facts.output_bytes
    assert costs.items[3].kv_bytes == 0
    assert costs.host_weight_bytes == facts.embedding_bytes
    everything = sum(item.weight_bytes for item in costs.items) + costs.host_weight_bytes
    assert everything == facts.weight_bytes


def test_slots_share_the_context_and_each_is_rounded_up(tmp_path: Path) -> None:
    model = plan_model(read_facts(make_model(tmp_path / "m.gguf")))

    def kv_bytes(ctx: int, slots: int) -> int:
        return costs_of(model, ctx_tokens=ctx, slots=slots, kv_type="f16").items[0].kv_bytes

    assert kv_bytes(2048, 2) == kv_bytes(2048, 1)
    assert kv_bytes(257, 1) == kv_bytes(512, 1)
    assert kv_bytes(600, 2) == kv_bytes(1024, 1)


def test_quantized_caches_are_smaller(tmp_path: Path) -> None:
    model = plan_model(read_facts(make_model(tmp_path / "m.gguf")))
    sizes = [
        costs_of(model, ctx_tokens=1024, slots=1, kv_type=kind).items[0].kv_bytes
        for kind in ("q4_0", "q8_0", "f16", "f32")
    ]
    assert sizes == sorted(set(sizes))
    with pytest.raises(UsageError, match="take one of f32, f16"):
        costs_of(model, ctx_tokens=1024, slots=1, kv_type="int8")


def test_of_experts_a_token_reads_those_that_it_uses(tmp_path: Path) -> None:
    dense = plan_model(read_facts(make_model(tmp_path / "dense.gguf")))
    assert dense.read_bytes == dense.layer_bytes
    facts = read_facts(make_model(tmp_path / "mixture.gguf", layers=2, experts=4))
    model = plan_model(facts)
    experts_bytes = sum(
        tensor.nbytes
        for tensor in facts.tensors
        if "blk.1." in tensor.name and "_exps" in tensor.name
    )
    unused = facts.n_expert - facts.n_expert_used
    assert facts.n_expert_used < facts.n_expert
    assert model.layer_bytes[1] - model.read_bytes[1] == pytest.approx(
        experts_bytes * unused / facts.n_expert, abs=10
    )


def test_layers_that_predict_further_tokens_are_counted_on(tmp_path: Path) -> None:
    """Whether they are used is decided when the plan is there."""
    model = plan_model(read_facts(make_model(tmp_path / "m.gguf", layers=2)))
    predicting = LayerMemory(guessing=(Cells(256, 256, 256),))
    state = LayerMemory(state_bytes=100, rolls_back=True)
    plain = replace(model, memory=(state, predicting))
    ahead = replace(plain, n_nextn=1)

    def kv_bytes(model: PlanModel) -> list[int]:
        costs = costs_of(model, ctx_tokens=1024, slots=1)
        return [item.kv_bytes for item in costs.items[:2]]

    assert kv_bytes(plain) == [100, 0]
    assert kv_bytes(ahead) == [4 * 100, 1024 * 512 * 2]
