"""The best ranges of items for devices in a given order: a row of costs, one device after another.

Sans-IO. `Row.cost[i]` is the least that items 0 to i - 1 cost when the last of them lie on the
row's node. A device's cost is a difference of sums, `sums[stop] - sums[start]`, and it holds any
range from `lowest[stop]` on, which only grows with `stop`; so the best start is the least of a
sliding window, and a device takes time in proportion to the number of items.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from meshnode.pipeline.predict import Site, Stage


@dataclass(frozen=True, eq=False)
class Seat:
    """A device and the bytes of items that it has room for, buffers not among them. One is another
    only if it is the same: much is looked up by them."""

    site: Site
    room_bytes: float


@dataclass(frozen=True)
class Terms:
    """What ranges cost on one seat. `sums[i]`: seconds for the items before i."""

    seat: Seat
    sums: tuple[float, ...]
    lowest: tuple[int, ...]
    fixed_s: float


@dataclass
class Row:
    """`starts` and `terms` say where the last range of each cell began, and on which seat; a
    merged row has the better cell of its `parts`."""

    cost: list[float]
    starts: list[int] = field(default_factory=list)
    terms: Terms | None = None
    before: Row | None = None
    parts: tuple[Row, ...] = ()

    def stages(self, stop: int) -> list[Stage]:
        """The stages that this cell stands for."""
        row, found = self, list[Stage]()
        while True:
            while row.parts:
                row = min(row.parts, key=lambda part: part.cost[stop])
            if row.terms is None or row.before is None:
                return found[::-1]
            start = row.starts[stop]
            found.append(Stage(row.terms.seat.site, start, stop))
            row, stop = row.before, start


def first_row(n_items: int) -> Row:
    """Nothing is placed yet."""
    return Row([0.0] + [math.inf] * n_items)


def extend(row: Row, terms: Terms, entry_s: float) -> Row:
    """One seat more, which takes at least one item. `entry_s`: what it takes to get there."""
    cost, sums, lowest = row.cost, terms.sums, terms.lowest
    n_items = len(cost) - 1
    found = [math.inf] * (n_items + 1)
    starts = [0] * (n_items + 1)
    entry_s += terms.fixed_s
    window = deque[tuple[float, int]]()  # the least comes first, then what is least without it
    first = next((index for index, one_s in enumerate(cost) if one_s != math.inf), n_items)
    for start in range(first, n_items):
        stop = start + 1
        value_s = cost[start] - sums[start]
        if value_s != math.inf:
            while window and window[-1][0] >= value_s:
                window.pop()
            window.append((value_s, start))
        low = lowest[stop]
        while window and window[0][1] < low:
            window.popleft()
        if window:
            least_s, starts[stop] = window[0]
            found[stop] = least_s + sums[stop] + entry_s
    return Row(found, starts, terms, row)


def merge(*rows: Row) -> Row:
    """The better of several, cell by cell."""
    return Row([min(cells) for cells in zip(*(row.cost for row in rows), strict=True)], parts=rows)


def lowest_starts(
    sizes: Sequence[float], room_bytes: float, pieces: Sequence[float], cap_s: float
) -> tuple[int, ...]:
    """For each stop, the first start from which a range has room, and takes `cap_s` at most for a
    piece of a prompt; both are sums up to each item."""
    found = [0]
    start = 0
    for stop in range(1, len(sizes)):
        least_size, least_piece = sizes[stop] - room_bytes, pieces[stop] - cap_s
        while start < stop and (sizes[start] < least_size or pieces[start] < least_piece):
            start += 1
        found.append(start)
    return tuple(found)
