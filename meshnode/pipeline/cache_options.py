"""What the user's own options for llama-server, those after `--`, say of caches. Sans-IO.

Their names and values are common/arg.cpp's. What llama-server would refuse is left to it, but for
types of a cache, whose names mesh tells as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from meshnode.errors import UsageError
from meshnode.models.kv import CACHE_TYPES, CacheOptions

_FLAGS = {
    **dict.fromkeys(("-kvu", "--kv-unified"), ("unified", True)),
    **dict.fromkeys(("-no-kvu", "--no-kv-unified"), ("unified", False)),
    "--swa-full": ("whole_windows", True),
}
_TYPES = {
    **dict.fromkeys(("-ctk", "--cache-type-k"), "k_type"),
    **dict.fromkeys(("-ctv", "--cache-type-v"), "v_type"),
}
_NUMBERS = {
    **dict.fromkeys(("-ub", "--ubatch-size"), "ubatch_tokens"),
    "--spec-draft-n-max": "rollback_tokens",
}
MAX_SLOTS = 256
_FLASH_ATTENTION = ("-fa", "--flash-attn")
_OFF = ("off", "disabled", "false", "0")


def cache_options(engine_options: Sequence[str], ctx_tokens: int, slots: int) -> CacheOptions:
    """The last of several options counts. Raises `UsageError` for an unknown type of a cache."""
    found = CacheOptions(ctx_tokens, slots)
    for option, following in pairwise((*engine_options, "")):
        name, separator, joined = option.partition("=")
        value = joined if separator else following
        found = replace(found, **_change(name.replace("_", "-"), value))
    return found


def known_cache_type(name: str) -> str:
    """`name`, or a `UsageError` that says which there are."""
    if name not in CACHE_TYPES:
        names = ", ".join(CACHE_TYPES)
        raise UsageError(f"{name!r} is no type for the KV cache: take one of {names}")
    return name


def _change(option: str, value: str) -> dict[str, Any]:
    if option in _FLAGS:
        return dict([_FLAGS[option]])
    if option in _TYPES:
        return {_TYPES[option]: known_cache_type(value)}
    if option in _NUMBERS and value.isdecimal():
        return {_NUMBERS[option]: int(value)}
    if option in _FLASH_ATTENTION:
        return {"flash_attention": value.lower() not in _OFF}
    return {}


def slots_of(engine_options: Sequence[str]) -> int:
    """The parallel requests the user asked llama-server for; it takes the last of several."""
    slots = 1
    for name, value in pairwise((*engine_options, "")):
        option, separator, joined = name.partition("=")
        if option in ("-np", "--parallel"):
            text = joined if separator else value
            if not text.isdecimal() or not 1 <= int(text) <= MAX_SLOTS:
                raise UsageError(f"{option} takes a number from 1 to {MAX_SLOTS}, not {text!r}")
            slots = int(text)
    return slots
