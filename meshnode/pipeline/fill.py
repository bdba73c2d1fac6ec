"""Contiguous items over places in a fixed order, each place filled to the same degree. Sans-IO.

At a given degree every place takes as many items as that share of its memory holds, what is taken
whatever it holds (buffers, the embedding) left out; taking the most at each place is the best that
can be done for contiguous ranges, so a bisection finds the smallest degree at which everything has
a place. That is "in proportion to usable memory", exact to one item, and never more than a place
has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshnode.pipeline.costs import Costs

_BISECTIONS = 24  # to one part in 16 million


@dataclass(frozen=True)
class Place:
    """A device to put items on. `reserved_bytes` of its memory are taken whatever it holds;
    `at_least_layers` it must have, the output being none."""

    node: str
    device: str
    usable_bytes: int
    reserved_bytes: int = 0
    at_least_layers: int = 0


@dataclass(frozen=True)
class Portion:
    """Items `start` to `stop` (left out) on a place."""

    place: Place
    start: int
    stop: int


def fill(costs: Costs, places: Sequence[Place], start: int, stop: int) -> list[Portion] | None:
    """The items over the places, those that get none left out; None if they do not fit."""
    best = _fill_to(1.0, costs, places, start, stop)
    if best is None:
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        degree = (low + high) / 2
        found = _fill_to(degree, costs, places, start, stop)
        if found is None:
            low = degree
        else:
            best, high = found, degree
    return [portion for portion in best if portion.stop > portion.start]


def left_over_bytes(costs: Costs, places: Sequence[Place], start: int, stop: int) -> int:
    """What has no room with every place full; 0 if all fits."""
    at = start
    for place in places:
        at = _take(1.0, costs, place, at, stop)
    return sum(item.total_bytes for item in costs.items[at:stop])


def _fill_to(
    degree: float, costs: Costs, places: Sequence[Place], start: int, stop: int
) -> list[Portion] | None:
    n_layers = len(costs.items) - 1
    owed = sum(place.at_least_layers for place in places)
    portions = []
    at = start
    for place in places:
        owed -= place.at_least_layers
        limit = n_layers - owed if owed else stop
        must = min(at + place.at_least_layers, n_layers)
        end = max(_take(degree, costs, place, at, limit), _take(1.0, costs, place, at, must))
        if max(0, min(end, n_layers) - at) < place.at_least_layers:
            return None
        portions.append(Portion(place, at, end))
        at = end
    return portions if at == stop else None


def _take(degree: float, costs: Costs, place: Place, at: int, limit: int) -> int:
    """The end of the items from `at` on that the place holds at this degree."""
    fixed_bytes = place.reserved_bytes + costs.device_compute_bytes
    room_bytes = degree * (place.usable_bytes - fixed_bytes)
    while at < limit and costs.items[at].total_bytes <= room_bytes:
        room_bytes -= costs.items[at].total_bytes
        at += 1
    return at
