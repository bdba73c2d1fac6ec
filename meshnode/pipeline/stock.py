"""What is on the disks of a plan's nodes, and so what a plan would have them pull. Sans-IO."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from meshnode.models.needs import EMBEDDING, OUTPUT, TensorClass, classify, layer_of, needed_tensors
from meshnode.models.spans import Span, joined

if TYPE_CHECKING:
    from meshnode.models.facts import ModelFacts, TensorFacts
    from meshnode.pipeline.plan import Share


class Cover:
    """I tell whether tensors lie in some spans."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = joined(spans)
        self._starts = [(span.file_index, span.start) for span in self._spans]

    def covers(self, tensor: TensorFacts) -> bool:
        at = bisect_right(self._starts, (tensor.file_index, tensor.offset)) - 1
        if at < 0 or self._spans[at].file_index != tensor.file_index:
            return not tensor.nbytes
        return tensor.offset + tensor.nbytes <= self._spans[at].stop


def names_within(facts: ModelFacts, spans: Sequence[Span]) -> frozenset[str]:
    """The tensors that lie in these spans as a whole."""
    there = Cover(spans)
    return frozenset(tensor.name for tensor in facts.tensors if there.covers(tensor))


@dataclass(frozen=True)
class Stock:
    """`held`: by node, the names of the tensors on its disk; of one that is not in there nobody
    knows that it holds anything. `bare`: nodes that keep nothing and are sent all by `home`."""

    facts: ModelFacts
    held: Mapping[str, Collection[str]]
    home: str
    bare: Collection[str] = ()

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {tensor.name: tensor.nbytes for tensor in self.facts.tensors}

    def missing_bytes(self, shares: Sequence[Share]) -> dict[str, int]:
        """By node of these shares, what it is to have and has not."""
        needed = {node: set(names) for node, names in needed_tensors(self.facts, shares).items()}
        for node in self.bare:
            needed[self.home] |= needed.pop(node, set())
        return {
            node: sum(self._sizes[name] for name in names - set(self.held.get(node, ())))
            for node, names in needed.items()
        }

    def layers_held(self, shares: Sequence[Share]) -> dict[str, tuple[int, int]]:
        """By node of these shares with layers: how many of them it holds, of how many."""
        incomplete: dict[str, set[int]] = {}
        counts: dict[str, int] = {}
        for share in shares:
            counts[share.node] = counts.get(share.node, 0) + share.n_layers
        for node, names in needed_tensors(self.facts, shares).items():
            lacking = set(names) - set(self.held.get(node, ()))
            layers = {layer_of(name) for name in lacking}
            incomplete[node] = {layer for layer in layers if layer is not None}
        return {
            node: (max(0, count - len(incomplete[node])), count)
            for node, count in counts.items()
            if count and node not in self.bare
        }

    def missing_sums(self, node: str) -> tuple[float, ...]:
        """Of the items before each (layers, then the output): what this node lacks of them."""
        keeper = self.home if node in self.bare else node
        held = self.held.get(keeper, ())
        items = [0] * (self.facts.n_layers + 1)
        for name, item in self._items.items():
            is_there = name in held or (name == EMBEDDING and keeper == self.home)  # whatever comes
            if not is_there:
                items[item] += self._sizes[name]
        return tuple(itertools.accumulate(map(float, items), initial=0.0))

    @cached_property
    def _items(self) -> Mapping[str, int]:
        """The item that each tensor goes with; those of the input stay at home whatever is planned,
        and those of every layer are small."""
        found = {}
        is_tied = OUTPUT not in self._sizes
        for name in self._sizes:
            layer = layer_of(name)
            kind = classify(name, self.facts.arch)
            if layer is not None:
                found[name] = layer
            elif kind is TensorClass.FIRST_LAYER:
                found[name] = 0
            elif kind is TensorClass.OUTPUT or (is_tied and name == EMBEDDING):
                found[name] = self.facts.n_layers
        return {name: item for name, item in found.items() if 0 <= item <= self.facts.n_layers}
