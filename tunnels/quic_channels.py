"""The channels of a QUIC link, each one bidirectional stream of its connection.

aioquic buffers sends without bound and widens windows whether or not anyone reads: `wait_writable`
and the credit of resume.py are what holds a fast sender back.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

import trio

from tunnels import quic_tuning as tuning
from tunnels.errors import LinkClosed
from tunnels.handshake import Role
from tunnels.link import Link
from tunnels.multiplexed import MultiplexedChannel

UNSENT_BYTES = 256 << 10  # queued in a channel and not yet sent once: beyond, writers wait
MAX_UNACCEPTED = 256  # channels the peer opened that wait for the session: twice what QUIC grants


class ChannelledLink(Link, Protocol):
    """The link, as its channels use it."""

    def write(self, stream_id: int, data: bytes, *, end: bool) -> None: ...

    def reset_channel(self, stream_id: int) -> None: ...

    def transmitted_bytes(self, stream_id: int) -> int | None:
        """None: the stream is over."""

    def taken(self, count: int) -> None:
        """Our side has received so many bytes of a channel."""


class QuicChannel(MultiplexedChannel[ChannelledLink]):
    """One bidirectional QUIC stream."""

    def __init__(self, link: ChannelledLink, stream_id: int) -> None:
        super().__init__(link)
        self._id = stream_id

    def send(self, data: bytes) -> None:
        if not self._finished:
            self._written += len(data)
            self._link.write(self._id, data, end=False)

    def finish(self) -> None:
        if not self._finished:
            self._finished = True
            self._link.write(self._id, b"", end=True)

    def reset(self) -> None:
        self.lose("the channel was reset")
        self._link.reset_channel(self._id)

    def stop_sending(self) -> None:
        self._finished = True
        self._writers.unpark_all()

    def _has_room(self) -> bool:
        sent = self._link.transmitted_bytes(self._id)
        return sent is None or self._written - sent <= UNSENT_BYTES

    def _taken(self, count: int) -> None:
        self._link.taken(count)


class QuicChannels:
    """I know which streams of one connection are channels in use."""

    def __init__(self, link: ChannelledLink, quic: tuning.BoundedConnection, role: Role) -> None:
        self._link = link
        self._quic = quic
        self._role = role
        self.by_stream: dict[int, QuicChannel] = {}
        self.unaccepted: deque[QuicChannel] = deque()  # opened by the peer
        self.one_way = False  # the peer opened a unidirectional stream
        self._acceptors = trio.lowlevel.ParkingLot()
        quic.held_bytes = self._held_bytes

    def __len__(self) -> int:
        return len(self.by_stream)

    def open(self) -> QuicChannel:
        """Raises LinkClosed."""
        self._check_open()
        self._sweep()
        stream_id = self._quic.get_next_available_stream_id()
        self._quic.send_stream_data(stream_id, b"")  # takes the number
        channel = self.by_stream[stream_id] = QuicChannel(self._link, stream_id)
        return channel

    async def accept(self) -> QuicChannel:
        """Raises LinkClosed."""
        while not self.unaccepted:
            self._check_open()
            await self._acceptors.park()
        return self.unaccepted.popleft()

    def of(self, stream_id: int) -> QuicChannel:
        """The one that something came for; the peer's own when it is new."""
        channel = self.by_stream.get(stream_id)
        if channel is None:
            self._sweep()
            channel = self.by_stream[stream_id] = QuicChannel(self._link, stream_id)
            theirs = bool(stream_id & 1) == (self._role is Role.DIALLER)
            self.one_way = self.one_way or bool(stream_id & 2)
            if theirs:
                self.unaccepted.append(channel)
                self._acceptors.unpark_all()
        return channel

    def lose(self, reason: str) -> None:
        """The link is over."""
        for channel in self.by_stream.values():
            channel.lose(reason)
        self.by_stream.clear()
        self._acceptors.unpark_all()

    def _check_open(self) -> None:
        if self._link.closure is not None:
            raise LinkClosed(self._link.closure.reason)

    def _sweep(self) -> None:
        """Forget the channels whose streams aioquic has forgotten: no event names them again."""
        for stream_id in list(self.by_stream):
            if tuning.transmitted_bytes(self._quic, stream_id) is None:
                del self.by_stream[stream_id]

    def _held_bytes(self, stream_id: int | None) -> int:
        if stream_id is None:
            return sum(channel.held_bytes for channel in self.by_stream.values())
        channel = self.by_stream.get(stream_id)
        return 0 if channel is None else channel.held_bytes
