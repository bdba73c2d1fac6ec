"""How many bytes a second come over a link: from a few bursts, and how soon each is there. Sans-IO.

The asker of a sounding asks for a burst, larger ones while they are short, and the last size twice.
A burst took from when it was asked for to its last byte, less the shortest wait for a first byte:
that is the way there and back. What disturbs (other programs, a window that opens slowly) only ever
makes it look slower, so the better of the last two counts.

What was found before has no part in it: a rate that fell is seen as soon as one that rose.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tunnels.peer import PeerId

KIB = 1024
BURSTS_BYTES = (32 * KIB, 96 * KIB, 160 * KIB, 352 * KIB)
MOST_BYTES = sum(BURSTS_BYTES) + BURSTS_BYTES[-1]
"""Of one sounding: less than a megabyte."""
LONG_S = 0.08
"""From which on a burst is told apart from chance."""
BURST_LIMIT_S = 0.25
"""Of which no more is waited for."""
LINK_BYTES_PER_S = (1e3, 1e11)
"""What a link may be said to carry."""
FRESH_S = 20.0
"""For which a rate is good enough for the next plan."""


@dataclass
class _Burst:
    size_bytes: int
    asked_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    first_bytes: int = 0
    bytes: int = 0


class Sounding:
    """I say which burst to ask for next, and what the rate is in the end."""

    def __init__(self) -> None:
        self._bursts: list[_Burst] = []

    def next_bytes(self) -> int | None:
        """The size of the next burst; None where there is none."""
        if not self._bursts:
            return BURSTS_BYTES[0]
        last = self._bursts[-1]
        is_second = [one.size_bytes for one in self._bursts].count(last.size_bytes) > 1
        if last.bytes < last.size_bytes or is_second:
            return None
        if last.last_s - last.asked_s - self._trip()[0] >= LONG_S:
            return last.size_bytes
        following = [size for size in BURSTS_BYTES if size > last.size_bytes]
        return following[0] if following else last.size_bytes

    def ask(self, size_bytes: int, now: float) -> None:
        self._bursts.append(_Burst(size_bytes, now))

    def arrive(self, size_bytes: int, now: float) -> None:
        """Of the burst that was asked for last."""
        burst = self._bursts[-1]
        if not burst.bytes:
            burst.first_s, burst.first_bytes = now, size_bytes
        burst.bytes += size_bytes
        burst.last_s = now

    def missing_bytes(self) -> int:
        return self._bursts[-1].size_bytes - self._bursts[-1].bytes

    @property
    def bytes_per_s(self) -> float | None:
        """None where too little came."""
        largest = max((one.size_bytes for one in self._bursts if one.bytes), default=0)
        rates = [self._rate(one) for one in self._bursts if one.size_bytes == largest and one.bytes]
        least, most = LINK_BYTES_PER_S
        found = max(rates, default=0.0)
        return min(max(found, least), most) if found else None

    def _trip(self) -> tuple[float, int]:
        """The shortest wait for a first byte, and how many came with it."""
        return min(
            (one.first_s - one.asked_s, one.first_bytes) for one in self._bursts if one.bytes
        )

    def _rate(self, burst: _Burst) -> float:
        """By the trip and by the burst's own first byte, which may have been late."""
        trip_s, first_bytes = self._trip()
        by_trip = _per_s(burst.bytes - first_bytes, burst.last_s - burst.asked_s - trip_s)
        own = _per_s(burst.bytes - burst.first_bytes, burst.last_s - burst.first_s)
        return min(by_trip, own)


def _per_s(size_bytes: int, duration_s: float) -> float:
    return max(0, size_bytes) / max(duration_s, 1e-6)


@dataclass(frozen=True)
class Found:
    """A rate, of which link (`path`), and since when it is known."""

    bytes_per_s: float
    path: str
    at_s: float


class Soundings:
    """I keep what was found last of each peer, for as long as the link to it is the same."""

    def __init__(self) -> None:
        self._found: dict[PeerId, Found] = {}
        self._tried: dict[PeerId, tuple[str, float]] = {}

    def keep(self, peer: PeerId, path: str, bytes_per_s: float | None, now: float) -> None:
        """None: it could not be found out, and is not tried again for a while."""
        self._tried[peer] = (path, now)
        if bytes_per_s is not None:
            self._found[peer] = Found(bytes_per_s, path, now)

    def find(self, peer: PeerId, path: str) -> Found | None:
        found = self._found.get(peer)
        return found if found is not None and found.path == path else None

    def is_due(self, peer: PeerId, path: str, now: float) -> bool:
        tried_path, tried_s = self._tried.get(peer, ("", 0.0))
        return tried_path != path or now >= tried_s + FRESH_S

    def forget_others(self, peers: Collection[PeerId]) -> None:
        """Those that are there no more."""
        for gone in self._tried.keys() - set(peers):
            del self._tried[gone]
            self._found.pop(gone, None)
