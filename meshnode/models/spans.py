"""Stretches of bytes of a model's files, and what can be said of sets of them.

Sets are tuples of spans; what comes out of `joined`, `within` and `without` is in disk order, and
no two of its spans touch.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Span:
    """Bytes `start` up to, not including, `stop` of file number `file_index`. Never empty."""

    file_index: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if self.file_index < 0 or not 0 <= self.start < self.stop:
            raise ValueError(f"no stretch of bytes: {self}")

    @property
    def size_bytes(self) -> int:
        return self.stop - self.start


def joined(spans: Iterable[Span], gap_bytes: int = 0) -> tuple[Span, ...]:
    """The union; neighbours with at most `gap_bytes` between them become one, gap included."""
    found: list[Span] = []
    for span in sorted(spans):
        last = found[-1] if found else None
        if (
            last is not None
            and last.file_index == span.file_index
            and span.start - last.stop <= gap_bytes
        ):
            found[-1] = Span(last.file_index, last.start, max(last.stop, span.stop))
        else:
            found.append(span)
    return tuple(found)


def within(spans: Iterable[Span], others: Iterable[Span]) -> tuple[Span, ...]:
    """What of `spans` is in `others` too."""
    twos = joined(others)
    return tuple(part for one in joined(spans) for part in _overlaps(one, twos))


def without(spans: Iterable[Span], others: Iterable[Span]) -> tuple[Span, ...]:
    """What of `spans` is not in `others`."""
    found: list[Span] = []
    holes = joined(others)
    for one in joined(spans):
        at = one.start
        for hole in _overlaps(one, holes):
            if at < hole.start:
                found.append(Span(one.file_index, at, hole.start))
            at = hole.stop
        if at < one.stop:
            found.append(Span(one.file_index, at, one.stop))
    return tuple(found)


def first_within(span: Span, others: Sequence[Span]) -> Span | None:
    """The first part of `span` that is in `others`, which must come from a function of here."""
    return next(_overlaps(span, others), None)


def size_of(spans: Sequence[Span]) -> int:
    """Bytes in all; what overlaps counts twice."""
    return sum(span.size_bytes for span in spans)


def _overlaps(span: Span, others: Sequence[Span]) -> Iterator[Span]:
    """Parts of `span` that are in `others`, which are in order and apart."""
    at = bisect.bisect_right(others, (span.file_index, span.start), key=_end)
    for other in _from(others, at):
        if (other.file_index, other.start) >= _end(span):
            return
        yield Span(span.file_index, max(span.start, other.start), min(span.stop, other.stop))


def _from(spans: Sequence[Span], at: int) -> Iterator[Span]:
    """Without a copy of the rest."""
    return (spans[index] for index in range(at, len(spans)))


def _end(span: Span) -> tuple[int, int]:
    return span.file_index, span.stop
