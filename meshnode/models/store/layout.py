"""Where the tensors of a model lie in its files."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from meshnode.models.facts import TensorFacts


class FileLayout:
    """The tensors of one file, by place."""

    def __init__(self, tensors: Iterable[TensorFacts], index: int) -> None:
        mine = (tensor for tensor in tensors if tensor.file_index == index)
        self._tensors = sorted(mine, key=place_of)
        self._starts = [tensor.offset for tensor in self._tensors]
        self.header_bytes = self._starts[0] if self._starts else 0

    def runs_of(self, tensors: Sequence[TensorFacts]) -> Iterator[tuple[int, int, int]]:
        """Where some of them lie, one after the other: start, stop, and bytes of tensors there.
        Punched together, so that no block between two of them stays."""
        names = {tensor.name for tensor in tensors}
        for chosen, run in groupby(self._tensors, lambda tensor: tensor.name in names):
            if chosen:
                members = list(run)
                size_bytes = sum(tensor.nbytes for tensor in members)
                yield members[0].offset, place_of(members[-1])[1], size_bytes

    def touching(self, start: int, stop: int) -> list[TensorFacts]:
        """Those that have bytes there, or none at all."""
        first = max(0, bisect_right(self._starts, start) - 1)
        last = bisect_right(self._starts, stop)
        return [t for t in self._tensors[first:last] if t.offset + t.nbytes >= start]


def place_of(tensor: TensorFacts) -> tuple[int, int]:
    """Where it begins in its file, and where it ends."""
    return tensor.offset, tensor.offset + tensor.nbytes
