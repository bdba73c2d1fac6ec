"""What tensors are for, and what a token reads of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshnode.models.classes import TensorKind, bytes_by_kind, kind_of, read_bytes
from meshnode.models.facts import TensorFacts, read_facts
from meshnode.models.needs import TensorClass, classify
from tests.engine.architectures import GENERATING, bert
from tests.engine.random_models import write_model
from tests.engine.synthetic import make_model

K = TensorKind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("token_embd.weight", K.EMBEDDING),
        ("per_layer_token_embd.weight", K.EMBEDDING),
        ("output.weight", K.OUTPUT),
        ("output_norm.weight", K.NORMS),
        ("blk.3.attn_k_norm.weight", K.NORMS),
        ("blk.3.attn_kv_a_mqa.weight", K.ATTENTION),
        ("blk.3.indexer.proj.weight", K.ATTENTION),
        ("dec.blk.3.cross_attn_q.weight", K.ATTENTION),
        ("blk.3.ffn_up.weight", K.FEED_FORWARD),
        ("blk.3.ffn_gate_inp.weight", K.FEED_FORWARD),
        ("blk.3.exp_probs_b.bias", K.FEED_FORWARD),
        ("blk.3.channel_mix_key.weight", K.FEED_FORWARD),
        ("blk.3.ffn_gate_exps.weight", K.EXPERTS),
        ("blk.3.ffn_gate_chexps.weight", K.EXPERTS),
        ("blk.3.ffn_gate.7.weight", K.EXPERTS),
        ("blk.3.ffn_up_shexp.weight", K.SHARED_EXPERTS),
        ("blk.3.ssm_in.weight", K.RECURRENT),
        ("blk.3.time_mix_key.weight", K.RECURRENT),
        ("blk.3.nextn.eh_proj.weight", K.OTHER),
        ("rope_freqs.weight", K.OTHER),
    ],
)
def test_a_name_says_what_a_tensor_is_for(name: str, kind: TensorKind) -> None:
    assert kind_of(name) is kind


@pytest.mark.parametrize("architecture", [*GENERATING, "bert"])
def test_every_byte_of_a_model_has_a_kind(tmp_path: Path, architecture: str) -> None:
    made = (GENERATING | {"bert": bert})[architecture]()
    facts = read_facts(write_model(tmp_path / "m.gguf", made))
    whole = bytes_by_kind(facts)
    assert sum(whole.values()) == facts.weight_bytes
    assert whole.get(K.OTHER, 0) <= sum(t.nbytes for t in facts.tensors if "rope" in t.name)
    for layer, layer_bytes in enumerate(facts.layer_bytes):
        by_name = sum(bytes_by_kind(facts, layer).values())
        computed_with_it = sum(
            tensor.nbytes
            for tensor in facts.tensors
            if layer == 0 and classify(tensor.name, facts.arch) is TensorClass.FIRST_LAYER
        )
        assert by_name + computed_with_it == layer_bytes
    assert (K.EXPERTS in whole) == (facts.n_expert > 0)
    assert (K.RECURRENT in whole) == facts.is_recurrent


def tensor(name: str, *ne: int) -> TensorFacts:
    shape = (*ne, 1, 1, 1, 1)
    return TensorFacts(name, 0, (shape[0], shape[1], shape[2], shape[3]), 9600, 0, 0)


def test_a_token_reads_the_experts_that_it_uses() -> None:
    assert read_bytes(tensor("blk.0.ffn_up_exps.weight", 8, 4, 12), 12, 3) == 2400
    assert read_bytes(tensor("blk.0.ffn_up_exps.bias", 8, 12), 12, 3) == 2400
    assert read_bytes(tensor("blk.0.ffn_up.5.weight", 8, 4), 12, 3) == 2400
    assert read_bytes(tensor("blk.0.ffn_up_chexps.weight", 8, 4, 2), 12, 3) == 9600
    assert read_bytes(tensor("blk.0.ffn_up_shexp.weight", 8, 4), 12, 3) == 9600
    assert read_bytes(tensor("blk.0.ffn_up.weight", 8, 4), 0, 0) == 9600
    assert read_bytes(tensor("blk.0.nextn.embed_tokens.weight", 8, 96), 0, 0) == 100


def test_a_dense_model_is_read_whole(tmp_path: Path) -> None:
    facts = read_facts(make_model(tmp_path / "m.gguf"))
    assert facts.read_bytes == facts.layer_bytes
    assert facts.weight_bytes < facts.n_parameters * 34 / 32 + 100_000, "8 bits a number, mostly"
    assert facts.quantization == "Q8_0"
    assert "add_generation_prompt" in (facts.chat_template or "")
