"""One direction of a link, sans-IO: when what goes in comes out.

First the rate, then the way: a byte waits until those before it have been sent, takes 1/rate
itself, then travels for the delay. All connections of a link share its rate, each keeps its order.
Cost a packet (headers, acknowledgements, a slow start) is not modelled.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

PIECE_BYTES = 4096
"""Within a piece all bytes come out with the last: at 15 MB/s, 0.27 ms."""
BACKLOG_S = 0.02
"""What a link takes in advance of what it has sent, as a router's queue does."""
FLIGHT_BYTES = 64 << 20


@dataclass(frozen=True)
class Way:
    """`rate`: bytes a second, None without limit."""

    delay_s: float = 0.0
    rate: float | None = None


class Shaper:
    """I hold the clock of one direction: when its wire is free."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._free_s = -math.inf

    @property
    def is_limited(self) -> bool:
        return self._way.rate is not None

    def take(self, size: int, now: float) -> float:
        """When `size` bytes that came now come out."""
        if self._way.rate is not None:
            self._free_s = max(self._free_s, now) + size / self._way.rate
            return self._free_s + self._way.delay_s
        return now + self._way.delay_s

    def ready_at(self) -> float:
        """From when on more is taken."""
        return self._free_s - BACKLOG_S


class Pipe:
    """One direction of one connection."""

    def __init__(self, shaper: Shaper) -> None:
        self._shaper = shaper
        self._queue: deque[tuple[float, memoryview]] = deque()
        self._held_bytes = 0

    def put(self, data: bytes, now: float) -> None:
        view = memoryview(data)
        step = PIECE_BYTES if self._shaper.is_limited else len(view)
        for start in range(0, len(view), step):
            piece = view[start : start + step]
            self._queue.append((self._shaper.take(len(piece), now), piece))
        self._held_bytes += len(view)

    def takes(self, now: float) -> bool:
        return self._held_bytes < FLIGHT_BYTES and self._shaper.ready_at() <= now

    def next_s(self) -> float:
        """When the next piece is due, inf when there is none."""
        return self._queue[0][0] if self._queue else math.inf

    def due(self, now: float) -> memoryview | None:
        """The next piece, if its time has come."""
        return self._queue[0][1] if self._queue and self._queue[0][0] <= now else None

    def drop(self, size: int) -> None:
        """That many bytes of the due piece have gone."""
        due_s, piece = self._queue.popleft()
        if size < len(piece):
            self._queue.appendleft((due_s, piece[size:]))
        self._held_bytes -= size

    def clear(self) -> None:
        self._queue.clear()
        self._held_bytes = 0

    @property
    def is_empty(self) -> bool:
        return not self._queue
