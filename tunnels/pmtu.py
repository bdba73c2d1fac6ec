"""How large datagrams may be on a path, found by trying (RFC 8899, RFC 9000 section 14.3). Sans-IO.

It begins with what QUIC asks of every path. A datagram of another size that nobody misses is sent
and acknowledged, or lost three times and so too large; the largest first, as most paths carry that,
then by halves. What routers say about sizes is not heard: anybody can say it, and many say nothing.

A path that carried large datagrams and carries them no more swallows them without a word (a black
hole). Told by timeouts in a row, and by large packets being lost while small ones arrive.
"""

from __future__ import annotations

import math

BASE_BYTES = 1200
PROBES = 3  # lost before a size is taken for too large
NARROW_BYTES = 12  # what is left to find is not worth a probe
RAISE_AFTER_S = 600.0  # a path may have become wider
SETTLE_S = 0.5  # after a fall: first what is under way
BLACK_HOLE_TIMEOUTS = 2  # in a row
BLACK_HOLE_LOSSES = 3  # of large packets, none of which was acknowledged in between
LARGEST_V4_BYTES = 1500 - 20 - 8
LARGEST_V6_BYTES = 1500 - 40 - 8


class PathMtu:
    """I say how large datagrams are to be, and when to try which size."""

    def __init__(self, largest: int, now: float) -> None:
        """largest: what is tried at most, in bytes of UDP payload."""
        self.size = BASE_BYTES
        self.restart(largest, now)

    def restart(self, largest: int, now: float) -> None:
        """The path is another one."""
        self.size = BASE_BYTES
        self._largest = largest
        self._too_large = largest + 1
        self._losses = 0  # of the size that is tried
        self._under_way: int | None = None
        self._at_s = now
        self._timeouts = 0
        self._large_losses = 0

    # --- the search ---------------------------------------------------------------------

    def deadline(self) -> float:
        """When `probe` is to be asked again; math.inf while one is under way."""
        return math.inf if self._under_way is not None else self._at_s

    def probe(self, now: float) -> int | None:
        """The size of a datagram to send now beside all others. `delivered` or `lost` follows."""
        if self._under_way is not None or now < self._at_s:
            return None
        if self._too_large - self.size <= NARROW_BYTES and self.size != self._largest:
            self._too_large = self._largest + 1
        if self.size == self._largest:
            self._at_s = math.inf
            return None
        whole = self._too_large > self._largest
        self._under_way = self._largest if whole else (self.size + self._too_large) // 2
        return self._under_way

    def delivered(self, size: int, now: float) -> None:
        if size != self._under_way:
            return  # of another path, or from before a fall
        self.size = size
        self._next(now)

    def lost(self, size: int, now: float) -> None:
        if size != self._under_way:
            return
        self._losses += 1
        if self._losses < PROBES:
            self._under_way = None
            return
        self._too_large = size
        self._next(now)

    def _next(self, now: float) -> None:
        self._under_way = None
        self._losses = 0
        found = self._too_large - self.size <= NARROW_BYTES
        self._at_s = now + RAISE_AFTER_S if found else now

    # --- black holes --------------------------------------------------------------------

    @property
    def suspects(self) -> bool:
        """Whether it would be news that a large packet was acknowledged."""
        return self._large_losses > 0

    def answered(self) -> None:
        """Something was acknowledged after all."""
        self._timeouts = 0

    def timed_out(self, now: float) -> None:
        """Nothing was acknowledged for as long as it takes at most."""
        self._timeouts += 1
        if self._timeouts >= BLACK_HOLE_TIMEOUTS:
            self._fall(now)

    def large_delivered(self) -> None:
        self._large_losses = 0

    def large_lost(self, now: float) -> None:
        """Packets larger than BASE_BYTES were lost, at once."""
        self._large_losses += 1
        if self._large_losses >= BLACK_HOLE_LOSSES:
            self._fall(now)

    def _fall(self, now: float) -> None:
        if self.size > BASE_BYTES:
            self.restart(self._largest, now + SETTLE_S)
