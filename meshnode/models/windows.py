"""Which layers look back over a window only, and how far: the `load_arch_hparams` of each
architecture in src/models upstream, and `load_swa_pattern` in src/llama-model.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from meshnode.models.metadata import Metadata

_KEY = "attention.sliding_window"
_PATTERN_KEY = "attention.sliding_window_pattern"


class _When(Enum):
    """When an architecture has windows at all."""

    ALWAYS = auto()
    IF_TOLD = auto()  # and more than 0
    UNLESS_ZERO = auto()


@dataclass(frozen=True)
class _Rule:
    """`every`: of so many layers the last attends to all tokens, or the first with `dense_first`;
    where the file has a pattern of its own, that counts. 0: the file must have one.
    `window`: where the file says none; `fixed`: whatever the file says."""

    every: int
    when: _When = _When.ALWAYS
    dense_first: bool = False
    window: int = 0
    fixed: bool = False


_RULES = {
    "afmoe": _Rule(4, _When.IF_TOLD),
    "cohere2": _Rule(4),
    "cohere2moe": _Rule(4, dense_first=True),
    "dflash": _Rule(0, _When.IF_TOLD),
    "dots3note": _Rule(0),
    "exaone-moe": _Rule(4, window=128),
    "exaone4": _Rule(4, window=4096),
    "gemma2": _Rule(2, window=4096),
    "gemma3": _Rule(6, _When.IF_TOLD),
    "gemma3n": _Rule(5),
    "gemma4": _Rule(0),
    "gemma4-assistant": _Rule(0),
    "gpt-oss": _Rule(2),
    "granite_swa": _Rule(0),
    "laguna": _Rule(4, _When.IF_TOLD, dense_first=True),
    "llama4": _Rule(4, _When.UNLESS_ZERO, window=8192, fixed=True),
    "maple": _Rule(0),
    "mellum": _Rule(4, _When.IF_TOLD),
    "mimo2": _Rule(0),
    "muse-glimmer": _Rule(4),
    "olmo2": _Rule(4, _When.IF_TOLD),
    "plamo3": _Rule(8, _When.IF_TOLD),
    "smallthinker": _Rule(4, _When.IF_TOLD, dense_first=True, window=4096, fixed=True),
    "spark2_5": _Rule(0),
    "step35": _Rule(0),
}
_EXAONE4_WITH_WINDOWS = 64  # layers: the 32B


def windows(
    metadata: Metadata, n_layers: int, n_trunk: int, recurrent: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """For each layer the tokens it looks back on, None for all of them. `n_trunk`: without those
    that predict further tokens."""
    everything: tuple[int | None, ...] = (None,) * n_layers
    arch = metadata.arch
    told = metadata.number(_KEY, default=0, most=1 << 32)
    if arch == "deepseek4" or (arch == "dflash" and metadata.has("hyper_connection.count")):
        return (told,) * n_layers
    if arch == "lfm2" and told:
        attends = [layer < n_trunk and not recurrent[layer] for layer in range(n_layers)]
        return tuple(told if windowed else None for windowed in attends)
    rule = _RULES.get(arch)
    if rule is None or (arch == "exaone4" and n_trunk != _EXAONE4_WITH_WINDOWS):
        return everything
    if rule.when is _When.IF_TOLD and not told:
        return everything
    if rule.when is _When.UNLESS_ZERO and metadata.has(_KEY) and not told:
        return everything
    window = rule.window if rule.fixed or not metadata.has(_KEY) else told
    if not window and not metadata.has(_KEY):
        return everything  # the engine will not load it
    pattern = _pattern(metadata, rule, n_layers, n_trunk)
    return tuple(window if windowed else None for windowed in pattern)


def _pattern(metadata: Metadata, rule: _Rule, n_layers: int, n_trunk: int) -> tuple[bool, ...]:
    told = metadata.flags(_PATTERN_KEY, n_layers)
    if told is not None:
        return told
    if not rule.every:
        return (False,) * n_layers  # the engine will not load it
    every = metadata.number(_PATTERN_KEY, default=rule.every)
    if rule.dense_first:
        found = [every == 0 or layer % every != 0 for layer in range(n_trunk)]
    else:
        found = [every == 0 or layer % every < every - 1 for layer in range(n_trunk)]
    return tuple(found) + (False,) * (n_layers - n_trunk)
