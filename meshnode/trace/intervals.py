"""Stretches of time: pairs of begin and end in ns, the end not included. Sans-IO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Interval = tuple[int, int]


def merge(intervals: Iterable[Interval], gap_ns: int = 0) -> list[Interval]:
    """In order, without overlaps; what is at most `gap_ns` apart becomes one."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1] + gap_ns:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def cut(intervals: Iterable[Interval], begin: int, end: int) -> list[Interval]:
    """What of them lies between `begin` and `end`."""
    parts = ((max(begin, first), min(end, last)) for first, last in intervals)
    return [part for part in parts if part[0] < part[1]]


def subtract(whole: Iterable[Interval], parts: Sequence[Interval]) -> list[Interval]:
    """What is in `whole` and in none of `parts`."""
    rest: list[Interval] = []
    holes = merge(parts)
    at = 0
    for first, last in merge(whole):
        begin = first
        while at < len(holes) and holes[at][1] <= begin:
            at += 1
        hole = at
        while hole < len(holes) and holes[hole][0] < last:
            if begin < holes[hole][0]:
                rest.append((begin, holes[hole][0]))
            begin = max(begin, holes[hole][1])
            hole += 1
        if begin < last:
            rest.append((begin, last))
    return rest


def intersect(one: Iterable[Interval], other: Sequence[Interval]) -> list[Interval]:
    """What is in both."""
    first = merge(one)
    return subtract(first, subtract(first, other))


def length(intervals: Iterable[Interval]) -> int:
    """In ns; the intervals do not overlap."""
    return sum(end - begin for begin, end in intervals)
