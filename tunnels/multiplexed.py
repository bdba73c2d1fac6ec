"""What the channels of a link have in common that carries all of them over one connection."""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

import trio

from tunnels.allowance import Share
from tunnels.errors import LinkClosed
from tunnels.link import Link, NeverLent

RECEIVE_BYTES = 32 << 10  # handed to a reader at once, so that no peer's bytes stop all others

AnyLink = TypeVar("AnyLink", bound=Link)


class MultiplexedChannel(NeverLent, Generic[AnyLink]):
    """A reader, writers that wait, and an end. A kind says how bytes are sent (`send`, `finish`,
    `reset`), whether more may be written, and who is told of what was received."""

    def __init__(self, link: AnyLink) -> None:
        self._link = link
        self._arrived: deque[memoryview] = deque()
        self.held_bytes = 0  # arrived, and not yet received by our side
        self._written = 0
        self._at_end = False
        self._finished = False  # we send no more
        self._gone: str | None = None
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    @property
    def link(self) -> AnyLink:
        return self._link

    @property
    def share(self) -> Share:
        return self._link.share

    async def wait_writable(self) -> None:
        while not self._finished and not self._has_room():
            await self._writers.park()

    async def receive(self) -> bytes:
        while not self._arrived:
            if self._at_end:
                return b""
            if self._gone is not None:
                raise LinkClosed(self._gone)
            await self._readers.park()
        pieces = [self._arrived.popleft()]
        size = len(pieces[0])
        while self._arrived and size + len(self._arrived[0]) <= RECEIVE_BYTES:
            pieces.append(self._arrived.popleft())
            size += len(pieces[-1])
        if size > RECEIVE_BYTES:  # one piece, that filled a gap
            self._arrived.appendleft(pieces[0][RECEIVE_BYTES:])
            pieces = [pieces[0][:RECEIVE_BYTES]]
            size = RECEIVE_BYTES
        self.held_bytes -= size
        self._taken(size)
        return b"".join(pieces)

    # --- called by the link -------------------------------------------------------------

    def feed(self, data: bytes, end: bool = False) -> None:
        if data and self._gone is None:
            self._arrived.append(memoryview(data))
            self.held_bytes += len(data)
        self._at_end = self._at_end or end
        self._readers.unpark_all()

    def lose(self, reason: str) -> None:
        """What has arrived can still be received."""
        self._finished = True
        if self._gone is None:
            self._gone = reason
        self._readers.unpark_all()
        self._writers.unpark_all()

    def wake_writers(self) -> None:
        if self._writers and (self._finished or self._has_room()):
            self._writers.unpark_all()

    # --- by each kind -------------------------------------------------------------------

    def _has_room(self) -> bool:
        raise NotImplementedError

    def _taken(self, count: int) -> None:
        """Our side has received so many bytes more."""
        raise NotImplementedError
