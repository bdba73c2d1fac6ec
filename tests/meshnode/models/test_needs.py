"""Which tensors each node of a plan has to have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from meshnode.models.facts import ModelFacts, read_facts
from meshnode.models.needs import TensorClass, classify, layer_of, needed_tensors
from meshnode.pipeline.plan import Share
from tests.engine.synthetic import make_model

ENDS = ("token_embd.weight", "output_norm.weight", "output.weight")


@pytest.fixture(scope="module")
def any_facts(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return read_facts(make_model(tmp_path_factory.mktemp("model") / "m.gguf", layers=4))


def facts(
    model: ModelFacts, names: Sequence[str], *, arch: str = "llama", nextn: int = 0
) -> ModelFacts:
    """A model of four layers of one tensor each, and of these tensors."""
    named = (*names, *(f"blk.{layer}.attn_q.weight" for layer in range(4)))
    tensors = tuple(replace(model.tensors[0], name=name) for name in named)
    return replace(model, arch=arch, tensors=tensors, n_layers=4, n_nextn=nextn)


def share(node: str, first: int, last: int, *, output: bool = False) -> Share:
    return Share(node, "CPU", first, last, output, 0, 0, 0)


def names(found: Sequence[str]) -> set[str]:
    return {name.removesuffix(".weight").replace(".attn_q", "") for name in found}


THREE = (share("local", 0, 1), share("a", 1, 3), share("b", 3, 4, output=True))


def test_each_node_needs_its_layers_and_the_ends_are_where_they_are_computed(
    any_facts: ModelFacts,
) -> None:
    needs = needed_tensors(facts(any_facts, ENDS), THREE)
    assert names(needs["local"]) == {"token_embd", "blk.0"}
    assert names(needs["a"]) == {"blk.1", "blk.2"}
    assert names(needs["b"]) == {"blk.3", "output_norm", "output"}


def test_alone_a_node_needs_everything(any_facts: ModelFacts) -> None:
    whole = facts(any_facts, (*ENDS, "rope_freqs.weight", "some.odd_thing"))
    needs = needed_tensors(whole, (share("local", 0, 4, output=True),))
    assert needs == {"local": tuple(tensor.name for tensor in whole.tensors)}


def test_what_all_layers_share_is_needed_wherever_there_is_one(any_facts: ModelFacts) -> None:
    model = facts(any_facts, (*ENDS, "rope_freqs.weight", "rope_factors_long.weight"))
    shares = (share("local", 0, 0), share("a", 0, 4), share("b", 4, 4, output=True))
    needs = needed_tensors(model, shares)
    assert {"rope_freqs", "rope_factors_long"} <= names(needs["a"])
    assert names(needs["local"]) == {"token_embd"}
    assert names(needs["b"]) == {"output_norm", "output"}


def test_what_comes_before_the_first_layer_is_needed_with_it(any_facts: ModelFacts) -> None:
    model = facts(any_facts, (*ENDS, "token_embd_norm.weight", "per_layer_model_proj.weight"))
    needs = needed_tensors(model, (share("local", 0, 0), share("a", 0, 4, output=True)))
    assert names(needs["local"]) == {"token_embd"}
    assert {"token_embd_norm", "per_layer_model_proj"} <= names(needs["a"])


def test_the_norm_that_lfm2_names_like_the_embedding_s_is_the_output_s(
    any_facts: ModelFacts,
) -> None:
    model = facts(any_facts, ("token_embd.weight", "token_embd_norm.weight"), arch="lfm2")
    needs = needed_tensors(model, THREE)
    assert names(needs["b"]) == {"blk.3", "token_embd", "token_embd_norm"}
    assert names(needs["local"]) == {"token_embd", "blk.0"}


def test_a_tied_output_is_needed_at_both_ends(any_facts: ModelFacts) -> None:
    needs = needed_tensors(facts(any_facts, ENDS[:2]), THREE)
    assert "token_embd.weight" in needs["local"]
    assert "token_embd.weight" in needs["b"]
    assert "token_embd.weight" not in needs["a"]


@pytest.mark.parametrize("arch", ["nomic-bert", "bitnet"])
def test_an_embedding_that_is_no_output_is_needed_once(any_facts: ModelFacts, arch: str) -> None:
    needs = needed_tensors(facts(any_facts, ENDS[:2], arch=arch), THREE)
    assert [node for node, held in needs.items() if "token_embd.weight" in held] == ["local"]


def test_one_matrix_that_is_called_the_output_is_needed_at_both_ends(
    any_facts: ModelFacts,
) -> None:
    needs = needed_tensors(facts(any_facts, ENDS[1:], arch="codeshell"), THREE)
    assert "output.weight" in needs["local"]
    assert "output.weight" in needs["b"]


def test_what_is_of_no_known_kind_stays_on_the_orchestrator(any_facts: ModelFacts) -> None:
    needs = needed_tensors(facts(any_facts, (*ENDS, "some.odd_thing")), THREE)
    assert [node for node, held in needs.items() if "some.odd_thing" in held] == ["local"]


def test_layers_that_predict_further_tokens_follow_an_output_that_stays_home(
    any_facts: ModelFacts,
) -> None:
    model = facts(any_facts, (*ENDS, "rope_freqs.weight"), nextn=1)
    away = (share("local", 0, 0), share("a", 0, 3), share("b", 3, 4, output=True))
    assert names(needed_tensors(model, away)["b"]) == {
        "blk.3",
        "rope_freqs",
        "output",
        "output_norm",
    }
    home = (share("local", 0, 0, output=True), share("a", 0, 3), share("b", 3, 4))
    needs = needed_tensors(model, home)
    assert needs["b"] == ()
    assert names(needs["local"]) == {"token_embd", "rope_freqs", "output", "output_norm", "blk.3"}
    assert names(needs["a"]) == {"blk.0", "blk.1", "blk.2", "rope_freqs"}


def test_a_node_with_two_devices_needs_what_either_does(any_facts: ModelFacts) -> None:
    shares = (share("local", 0, 0), share("a", 0, 4), share("local", 4, 4, output=True))
    needs = needed_tensors(facts(any_facts, ENDS, nextn=1), shares)
    assert names(needs["local"]) == {"token_embd", "output", "output_norm"}
    assert list(needs) == ["local", "a"]


def test_layers_of_encoders_and_decoders_count_too() -> None:
    assert layer_of("dec.blk.12.attn_q.weight") == 12
    assert layer_of("enc.blk.0.attn_q.weight") == 0
    assert layer_of("blkless") is None
    assert classify("enc.output_norm.weight", "t5") is TensorClass.OUTPUT


def test_every_tensor_is_somebody_s(tmp_path: Path) -> None:
    model = read_facts(make_model(tmp_path / "m.gguf", layers=4))
    needs = needed_tensors(model, THREE)
    assert {name for held in needs.values() for name in held} == {t.name for t in model.tensors}
