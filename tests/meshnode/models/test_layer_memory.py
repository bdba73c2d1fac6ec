"""What the layers of every architecture keep of conversations.

`engine_memory.json` has, for each architecture of which the pinned llama.cpp makes tiny models
(its `test-llama-archs --out`), what our reader looks up in the header and what llama-server then
took in MiB: with `-c 16384 -np 8`, and besides with each of `WAYS`. `tests/engine/record_memory.py`
writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meshnode.models.facts import ModelFacts, facts_of
from meshnode.models.header import ArrayValue, Header, HeaderTensor
from meshnode.models.kv import CacheOptions, Cells, LayerMemory, memory_bytes
from meshnode.models.layer_memory import WITHOUT_CACHE

RECORDED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("engine_memory.json").read_text()
)
WAYS = {
    "plain": CacheOptions(16384, 8),
    "no flash attention": CacheOptions(16384, 8, flash_attention=False),
    "unified": CacheOptions(16384, 8, unified=True),
    "whole windows": CacheOptions(16384, 8, whole_windows=True),
}
BASE: dict[str, Any] = {"block_count": 6, "embedding_length": 64, "attention.head_count": 4}
"""Heads of 16 numbers."""


def facts(arch: str, told: dict[str, Any]) -> ModelFacts:
    """Of a header that says this below its architecture."""
    values = {
        f"{arch}.{key}": ArrayValue(len(value), tuple(value)) if isinstance(value, list) else value
        for key, value in told.items()
    }
    metadata = {"general.architecture": arch, **values}
    return facts_of([Header(Path("m.gguf"), 0, metadata, (), b"", 0)])


def windows(arch: str, **told: Any) -> list[int | None]:
    keys = {f"attention.{key}": value for key, value in told.items() if key != "block_count"}
    layers = {"block_count": told["block_count"]} if "block_count" in told else {}
    memory = facts(arch, BASE | keys | layers).memory
    return [cells.window for layer in memory for cells in layer.caches]


@pytest.mark.parametrize("name", RECORDED)
def test_the_header_alone_says_what_the_engine_takes(name: str) -> None:
    recorded = RECORDED[name]
    memory = facts(recorded["arch"], recorded["metadata"]).memory
    for way, options in WAYS.items():
        figures = recorded["mib"][way]
        mib = sum(memory_bytes(layer, options) for layer in memory) / 2**20
        assert mib == pytest.approx(sum(figures), abs=0.0051 * max(1, len(figures))), way


def test_a_state_makes_a_model_recurrent_whatever_its_tensors_are_called() -> None:
    linear = facts("minimax-01", BASE)
    assert linear.is_recurrent
    assert [layer.state_bytes > 0 for layer in linear.memory] == [True] * 6
    assert not facts("llama", BASE).is_recurrent


def test_nearly_every_architecture_is_recorded() -> None:
    known = {recorded["arch"] for recorded in RECORDED.values()} | WITHOUT_CACHE
    assert len(known) >= 135  # of 144 in llama-arch.cpp


def test_a_window_is_the_architecture_s_where_the_file_says_none() -> None:
    assert windows("gemma2") == [4096, None] * 3
    assert windows("gemma3", sliding_window=8) == [8] * 5 + [None]
    assert windows("gemma3") == [None] * 6
    assert windows("llama4") == [8192, 8192, 8192, None, 8192, 8192]
    assert windows("llama4", sliding_window=0) == [None] * 6
    assert windows("cohere2moe", sliding_window=8) == [None, 8, 8, 8, None, 8]
    assert windows("exaone4", sliding_window=8) == [None] * 6
    assert windows("exaone4", block_count=64).count(4096) == 48
    assert windows("phi3", sliding_window=8) == [None] * 6, "switched off in the engine"


def test_a_pattern_in_the_file_counts() -> None:
    assert windows("gemma3", sliding_window=8, sliding_window_pattern=2) == [8, None] * 3
    told = [True, True, False]
    assert windows("gpt-oss", sliding_window=8, sliding_window_pattern=told)[:4] == [
        8,
        8,
        None,
        None,
    ]
    assert windows("gpt-oss", sliding_window=8, sliding_window_pattern=0) == [8] * 6
    assert windows("step35", sliding_window=8) == [None] * 6, "the engine asks for a pattern"
    assert windows("cohere2") == [None] * 6, "and here for a window"


def test_later_layers_of_gemma_use_the_caches_of_earlier_ones() -> None:
    told = BASE | {"block_count": 30, "attention.sliding_window": 8}
    assert [bool(layer.caches) for layer in facts("gemma3n", told).memory].count(True) == 20
    told |= {"attention.shared_kv_layers": 10, "attention.sliding_window_pattern": [1] * 30}
    kept = facts("gemma4", told | {"attention.key_length_swa": 8}).memory
    assert [bool(layer.caches) for layer in kept] == [True] * 20 + [False] * 10
    assert kept[0].caches == (Cells(4 * 8, 4 * 16, 4 * 16, window=8),)


def test_layers_that_predict_further_tokens_keep_something_only_then() -> None:
    told = BASE | {"nextn_predict_layers": 1}
    last = facts("glm4moe", told).memory[-1]
    assert (last.caches, last.guessing) == ((), (Cells(64, 64, 64),))
    assert memory_bytes(last, CacheOptions(256)) == 0
    assert memory_bytes(last, CacheOptions(256, guessing=True)) == 256 * 128 * 2


def test_states_are_kept_for_each_token_that_may_be_taken_back() -> None:
    layer = LayerMemory(state_bytes=100, rolls_back=True)
    assert memory_bytes(layer, CacheOptions(256, 2)) == 200
    assert memory_bytes(layer, CacheOptions(256, 2, rollback_tokens=3)) == 800
    rigid = LayerMemory(state_bytes=100)
    assert memory_bytes(rigid, CacheOptions(256, 2, rollback_tokens=3)) == 200


def test_models_that_go_through_their_layers_again_keep_each_round() -> None:
    once = facts("nanbeige", BASE).memory
    thrice = facts("nanbeige", BASE | {"num_loops": 3}).memory
    options = CacheOptions(1024)
    assert memory_bytes(thrice[0], options) == 3 * memory_bytes(once[0], options)


def test_an_adapter_s_router_keeps_one_head_more() -> None:
    first, *_, last = facts("graniteswitch", BASE).memory
    assert last.caches == (*first.caches, Cells(16, 16, 16))


def test_indexers_are_where_the_file_or_the_architecture_has_them() -> None:
    told = BASE | {"block_count": 8, "attention.indexer.key_length": 4}
    told |= {"attention.key_length_mla": 8, "attention.value_length_mla": 8}

    def indexed(arch: str, **more: Any) -> list[int]:
        keys = {key.replace("_", "."): value for key, value in more.items()}
        memory = facts(arch, told | keys).memory
        return [layer for layer, kept in enumerate(memory) if len(kept.caches) > 1]

    assert indexed("glm-dsa") == list(range(8)), "GLM 5"
    assert facts("glm-dsa", told | {"context_length": 1 << 20}).memory[3].caches == (Cells(64),)
    assert facts("glm-dsa", told | {"context_length": 1 << 20}).memory[6].caches[1] == Cells(4)
    only = {"attention.indexer.types": [1, 0]}
    assert len(facts("glm-dsa", told | only).memory[1].caches) == 1
    assert len(facts("glm-dsa", told | {"attention.indexer.types": 0}).memory[0].caches) == 1


def test_an_index_of_a_layer_with_a_window_is_as_wide_as_its_keys() -> None:
    told = BASE | {"attention.indexer.key_length": 4, "attention.indexer.types": [1] * 6}
    told |= {"attention.key_length_mla": 8, "attention.value_length_mla": 8}
    told |= {"attention.sliding_window": 8, "attention.sliding_window_pattern": [1, 0] * 3}
    windowed, whole = facts("dots3note", told | {"attention.key_length_swa": 12}).memory[:2]
    assert windowed.caches == (Cells(4 * 12, window=8), Cells(12))
    assert whole.caches == (Cells(4 * 16), Cells(4))


def test_layers_that_are_recurrent_may_be_told_in_one_word() -> None:
    state = {"ssm.inner_size": 8, "ssm.state_size": 8}
    all_of_them = facts("qwen3next", BASE | state | {"attention.recurrent_layers": 1}).memory
    assert [bool(layer.state_bytes) for layer in all_of_them] == [True] * 6
    every_third = facts("qwen3next", BASE | state | {"full_attention_interval": 3}).memory
    assert [bool(layer.caches) for layer in every_third] == [False, False, True] * 2


def test_layers_that_predict_further_tokens_wait_for_no_compressor() -> None:
    told = BASE | {"attention.sliding_window": 8, "nextn_predict_layers": 1}
    told |= {"attention.compress_ratios": [4] * 6, "attention.indexer.key_length": 4}
    metadata = {f"deepseek4.{key}": value for key, value in told.items()}
    metadata["deepseek4.attention.compress_ratios"] = ArrayValue(6, (4,) * 6)
    metadata["general.architecture"] = "deepseek4"
    probe = HeaderTensor("blk.5.nextn.eh_proj.weight", 0, (1, 1, 1, 1), 4, 0)
    memory = facts_of([Header(Path("m.gguf"), 4, metadata, (probe,), b"", 0)]).memory
    assert [bool(layer.state_bytes) for layer in memory] == [True] * 5 + [False]
    assert bool(memory[5].guessing)


def test_a_conversation_without_end_grows_by_what_has_no_window() -> None:
    assert LayerMemory((Cells(8, 8), Cells(8, window=5), Cells(8, ratio=4))).bytes_per_token == 36
    assert facts("mamba", BASE | {"ssm.inner_size": 8, "ssm.state_size": 8}).memory[
        0
    ] == LayerMemory(state_bytes=8 * 8 * 4)
