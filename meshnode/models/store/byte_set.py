"""Which bytes of one file are there: ranges that come and go, joined where they touch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class ByteSet:
    """A set of bytes of one file, kept as ranges that neither meet nor overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._stops, strict=True)

    def copy(self) -> ByteSet:
        found = ByteSet()
        found._starts, found._stops = self._starts.copy(), self._stops.copy()
        return found

    def add(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        first = bisect_left(self._stops, start)
        last = bisect_right(self._starts, stop)
        if first < last:
            start = min(start, self._starts[first])
            stop = max(stop, self._stops[last - 1])
        self._starts[first:last] = [start]
        self._stops[first:last] = [stop]

    def remove(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        first = bisect_right(self._stops, start)
        last = bisect_left(self._starts, stop)
        if first >= last:
            return
        left = (self._starts[first], start)
        right = (stop, self._stops[last - 1])
        kept = [one for one in (left, right) if one[0] < one[1]]
        self._starts[first:last] = [one[0] for one in kept]
        self._stops[first:last] = [one[1] for one in kept]

    def covers(self, start: int, stop: int) -> bool:
        return not any(True for _ in self.gaps(start, stop))

    def gaps(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of `start` up to `stop` that are not in the set."""
        at = bisect_right(self._stops, start)
        while start < stop:
            if at == len(self._starts) or self._starts[at] >= stop:
                yield start, stop
                return
            if start < self._starts[at]:
                yield start, self._starts[at]
            start = self._stops[at]
            at += 1

    def parts(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of `start` up to `stop` that are in the set."""
        for gap_start, gap_stop in [*self.gaps(start, stop), (stop, stop)]:
            if start < gap_start:
                yield start, gap_start
            start = gap_stop
