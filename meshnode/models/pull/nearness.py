"""Whom to ask for what several members have: the near ones. Sans-IO.

A neighbour on the same switch gives what a member across an ocean would, and troubles nobody's line
to the internet with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAX_ASKED = 8
"""At once, of those who have the same: the threads of pulls are few."""
NEAR_FACTOR = 2.0
NEAR_S = 0.005
"""Times of a round trip in one building differ by as much as this, and say nothing."""


@dataclass(frozen=True)
class Turn:
    """See `Supplier`."""

    rank: int
    is_far: bool


def distance_s(rtt_s: float | None) -> float:
    """One that nobody has measured is farther than all."""
    return math.inf if rtt_s is None else rtt_s


def turns(rtts_s: Sequence[float | None]) -> list[Turn]:
    """Of these, by the round trip to each."""
    away_s = [distance_s(rtt_s) for rtt_s in rtts_s]
    near_s = NEAR_FACTOR * min(away_s, default=math.inf) + NEAR_S
    nearest = sorted(range(len(away_s)), key=away_s.__getitem__)[:MAX_ASKED]
    return [Turn(int(number not in nearest), one > near_s) for number, one in enumerate(away_s)]
