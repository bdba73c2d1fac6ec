"""Which of several ways to a peer is the better one: ranked, with hysteresis. Sans-IO.

    choice = choose(choice, [Path(link, link.rank, relayed, beat.rtt_s, beat.suspected), …], now)

is asked whenever a path comes or goes and whenever a round trip was measured; `choice.key` is the
path to use. What counts, in this order:

1. A path that is heard before one that has been silent. At once.
2. A direct path before a relayed one, however fast that is: it is somebody else's line. At once.
3. The rank of its kind, lowest first. At once too, for a path that is new.
4. The round trip. A path of a better kind is left for one that is far faster (twice, and 20 ms),
   and taken again when it is about as fast; of two of one kind the clearly faster one is taken.
   Each of these must hold for HOLD_S, for a change costs what is under way.

Round trips are measured all the time, and they rise as well as fall (roundtrips.py forgets): a
path that has become slow does not live on its past.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

HOLD_S = 10.0
FAR_SLOWER, FAR_SLOWER_S = 2.0, 0.02
ABOUT_AS_FAST, ABOUT_AS_FAST_S = 1.25, 0.005
CLEARLY_FASTER, CLEARLY_FASTER_S = 0.8, 0.005

Key = TypeVar("Key")  # hashable


@dataclass(frozen=True)
class Path(Generic[Key]):
    """key: what the caller knows it by. rank: of its kind, lower is better (link.py). rtt_s: as it
    is now; None: nothing was measured yet, which counts neither way."""

    key: Key
    rank: int
    relayed: bool = False
    rtt_s: float | None = None
    suspected: bool = False

    @property
    def tier(self) -> tuple[bool, bool]:
        return self.suspected, self.relayed


@dataclass(frozen=True)
class Choice(Generic[Key]):
    """key: the path to use; None when there is none. left: paths that became slow. rival: what may
    take over when it has been the better one for HOLD_S, which it is since `since_s`."""

    key: Key | None = None
    left: frozenset[Key] = frozenset()
    rival: Key | None = None
    since_s: float = 0.0


def choose(last: Choice[Key], paths: Sequence[Path[Key]], now: float) -> Choice[Key]:
    """The path to use from now on. last: what this said before; `Choice()` at first."""
    if not paths:
        return Choice()
    left = last.left & {path.key for path in paths}
    tier = min(path.tier for path in paths)
    candidates = [path for path in paths if path.tier == tier]
    current = next((path for path in candidates if path.key == last.key), None)
    if current is None:
        return Choice(min(candidates, key=_order).key, left)
    rivals = [path for path in candidates if path is not current and _beats(path, current)]
    if not rivals:
        return Choice(current.key, left)
    rival = min(rivals, key=_order)
    is_new = rival.rank < current.rank and rival.key not in left
    since_s = last.since_s if last.rival == rival.key else now
    if is_new or now - since_s >= HOLD_S:
        slow = {current.key} if current.rank < rival.rank else set()
        return Choice(rival.key, (left | slow) - {rival.key})
    return Choice(current.key, left, rival.key, since_s)


def _order(path: Path[Key]) -> tuple[int, float]:
    return path.rank, math.inf if path.rtt_s is None else path.rtt_s


def _beats(rival: Path[Key], current: Path[Key]) -> bool:
    """Whether it should take over, if this lasts. Both are of one tier."""
    if rival.rtt_s is None or current.rtt_s is None:
        return rival.rank < current.rank
    if rival.rank < current.rank:
        return rival.rtt_s <= current.rtt_s * ABOUT_AS_FAST + ABOUT_AS_FAST_S
    if rival.rank == current.rank:
        return rival.rtt_s < current.rtt_s * CLEARLY_FASTER - CLEARLY_FASTER_S
    return rival.rtt_s * FAR_SLOWER + FAR_SLOWER_S < current.rtt_s
