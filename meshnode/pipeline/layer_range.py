"""`27:52`: some layers of a model, as users write them."""

from __future__ import annotations

import re
from dataclasses import replace

from meshnode.errors import UsageError
from meshnode.models.facts import ModelFacts
from meshnode.models.needs import needed_tensors
from meshnode.pipeline.plan import Share

_LAYERS = re.compile(r"(?P<first>[0-9]{1,5}|output)(?::(?P<last>[0-9]{1,5}|output))?")
_HERE, _ELSEWHERE = "here", "elsewhere"
_EMPTY = Share(_ELSEWHERE, "", 0, 0, False, 0, 0, 0)


def tensors_of_layers(facts: ModelFacts, layers: str | None, *, what: str) -> tuple[str, ...]:
    """The tensors of these layers as a node needs them that computes them; None: all. `what`: how
    the user calls it. Raises `UsageError`."""
    if layers is None:
        return tuple(tensor.name for tensor in facts.tensors)
    return needed_tensors(facts, (_EMPTY, _share(facts, layers, what)))[_HERE]


def own_tensors(facts: ModelFacts, layers: str, *, what: str) -> tuple[str, ...]:
    """The tensors that these layers compute with and no others do. Raises `UsageError`."""
    share = _share(facts, layers, what)
    before = replace(_EMPTY, last_layer=share.first_layer)
    after = replace(
        _EMPTY,
        first_layer=share.last_layer,
        last_layer=facts.n_layers,
        has_output=not share.has_output,
    )
    needed = needed_tensors(facts, (before, share, after))
    others = set(needed[_ELSEWHERE])
    return tuple(name for name in needed[_HERE] if name not in others)


def _share(facts: ModelFacts, layers: str, what: str) -> Share:
    found = _LAYERS.fullmatch(layers.strip())
    if found is None:
        raise UsageError(f"{what} {layers[:40]!r}: write the first and the last, like 27:52")
    first, last = found["first"], found["last"] or found["first"]
    start = facts.n_layers if first == "output" else int(first)
    stop = facts.n_layers if last == "output" else int(last) + 1
    with_output = last == "output"
    if start > stop or stop > facts.n_layers or (start == stop and not with_output):
        raise UsageError(
            f"{what} {layers}: {facts.name} has the layers 0 to {facts.n_layers - 1}, then output"
        )
    return replace(_EMPTY, node=_HERE, first_layer=start, last_layer=stop, has_output=with_output)
