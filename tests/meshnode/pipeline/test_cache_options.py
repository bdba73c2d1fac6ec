"""The user's own options for llama-server decide how large caches become."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meshnode.errors import UsageError
from meshnode.models.kv import CacheOptions, Cells, LayerMemory
from meshnode.pipeline.cache_options import MAX_SLOTS, cache_options, slots_of
from meshnode.pipeline.costs import costs_of
from tests.meshnode.pipeline.plans import MODEL


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", {}),
        ("--temp 0 --jinja", {}),
        ("-ctk q8_0 --cache-type-v=f32", {"k_type": "q8_0", "v_type": "f32"}),
        ("--kv-unified --swa-full", {"unified": True, "whole_windows": True}),
        ("-kvu --no-kv-unified", {"unified": False}),
        ("-ub 2048", {"ubatch_tokens": 2048}),
        ("--ubatch_size 64 -ub x", {"ubatch_tokens": 64}),
        ("-fa off", {"flash_attention": False}),
        ("-fa off --flash-attn auto", {"flash_attention": True}),
        ("--spec-draft-n-max 8", {"rollback_tokens": 8}),
    ],
)
def test_options_are_read_as_llama_server_reads_them(
    options: str, expected: dict[str, object]
) -> None:
    found = cache_options(options.split(), 4096, 2)
    assert found == replace(CacheOptions(4096, 2), **expected)  # type: ignore[arg-type]


def test_an_unknown_type_is_told_before_anything_starts() -> None:
    with pytest.raises(UsageError, match="'int8' is no type for the KV cache: take one of f32"):
        cache_options(["-ctk", "int8"], 4096, 1)


def test_costs_grow_with_what_is_asked_for() -> None:
    windowed = LayerMemory((Cells(256, 256, 256, window=1024),))
    model = replace(MODEL, memory=(windowed,) * MODEL.n_layers)

    def kv_bytes(*options: str) -> int:
        cache = cache_options(options, 16384, 1)
        costs = costs_of(model, ctx_tokens=16384, slots=1, cache=cache)
        return costs.items[0].kv_bytes

    plain = kv_bytes()
    assert plain == (1024 + 512) * 1024
    assert kv_bytes("-ub", "2048") == (1024 + 2048) * 1024
    assert kv_bytes("--swa-full") == 16384 * 1024
    assert kv_bytes("-ctk", "f32", "-ctv", "f32") == 2 * plain


@pytest.mark.parametrize(
    ("options", "slots"),
    [("", 1), ("--jinja -np 4", 4), ("--parallel=8", 8), ("-np 4 --parallel 2", 2)],
)
def test_requests_at_once_are_those_that_the_user_asked_for_last(options: str, slots: int) -> None:
    assert slots_of(options.split()) == slots


@pytest.mark.parametrize("value", ["", "0", "-1", "many", str(MAX_SLOTS + 1)])
def test_requests_at_once_that_cannot_be_are_told(value: str) -> None:
    with pytest.raises(UsageError, match=f"--parallel takes a number from 1 to {MAX_SLOTS}, not"):
        slots_of([f"--parallel={value}"])
    with pytest.raises(UsageError, match="-np takes a number"):
        slots_of(["-np"])
