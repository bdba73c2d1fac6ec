"""Spans as they go over the wire, and as those that a stranger says are kept: 20 bytes each, where
a `Span` takes eight times that."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from meshnode.models.spans import Span

_SPAN = struct.Struct("<IQQ")
SPAN_BYTES = _SPAN.size


class PackedSpans(Sequence[Span]):
    """Spans, each made when it is looked at."""

    def __init__(self, data: bytes) -> None:
        """data: `pack`ed, each of them one that can be."""
        self._data = data

    def __len__(self) -> int:
        return len(self._data) // SPAN_BYTES

    @overload
    def __getitem__(self, index: int) -> Span: ...

    @overload
    def __getitem__(self, index: slice) -> PackedSpans: ...

    def __getitem__(self, index: int | slice) -> Span | PackedSpans:
        if isinstance(index, slice):
            return PackedSpans(pack(self[at] for at in range(len(self))[index]))
        return Span(*_SPAN.unpack_from(self._data, range(len(self))[index] * SPAN_BYTES))

    def __iter__(self) -> Iterator[Span]:
        return (Span(*row) for row in rows(self._data))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))


def pack(spans: Iterable[Span]) -> bytes:
    return b"".join(_SPAN.pack(one.file_index, one.start, one.stop) for one in spans)


def rows(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Number of the file, start and stop, which may be any."""
    return _SPAN.iter_unpack(data)
