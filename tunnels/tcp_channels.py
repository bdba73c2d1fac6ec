"""The channels of a tcp link: the control channel inside its first connection, and the others, each
a connection of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from tunnels.allowance import Share
from tunnels.errors import LinkClosed
from tunnels.link import CloseCode, NeverLent
from tunnels.tcp_connection import Connection, LentConnection
from tunnels.tcp_wire import MAX_CONTROL_BYTES, Control, encode

if TYPE_CHECKING:
    from tunnels.tcp import TcpLink

CONTROL_HELD_BYTES = 64 << 10  # of the control channel, not yet received by our side


class ControlChannel(NeverLent):
    """The first channel, inside the control connection."""

    def __init__(self, link: TcpLink, connection: Connection) -> None:
        self._link = link
        self._connection = connection
        self._arrived: deque[bytes] = deque()
        self.held_bytes = 0
        self._over = False
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def link(self) -> TcpLink:
        return self._link

    @property
    def share(self) -> Share:
        return self._link.share

    def send(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_CONTROL_BYTES):
            self._connection.send(encode(Control(data[start : start + MAX_CONTROL_BYTES])))

    async def wait_writable(self) -> None:
        await self._connection.wait_writable()

    async def receive(self) -> bytes:
        while not self._arrived:
            if self._link.closure is not None:
                raise LinkClosed(self._link.closure.reason)
            if self._over:
                return b""
            await self._changed.park()
        data = self._arrived.popleft()
        self.held_bytes -= len(data)
        self._changed.unpark_all()
        return data

    def finish(self) -> None:
        """The link has no use for half of it."""
        self._connection.finish()

    def reset(self) -> None:
        self._link.close(CloseCode.LINK_OVER, "the control channel was reset")

    # --- called by the link -------------------------------------------------------------

    async def feed(self, data: bytes) -> None:
        self._arrived.append(data)
        self.held_bytes += len(data)
        self._changed.unpark_all()
        while self.held_bytes > CONTROL_HELD_BYTES and self._link.closure is None:
            await self._changed.park()

    def end(self) -> None:
        self._over = True
        self._changed.unpark_all()


class TcpChannel:
    """One further connection."""

    def __init__(self, link: TcpLink, connection: Connection) -> None:
        self._link = link
        self._since_s = trio.current_time()
        self.connection = connection

    @property
    def link(self) -> TcpLink:
        return self._link

    @property
    def share(self) -> Share:
        return self._link.share

    def send(self, data: bytes) -> None:
        self.connection.send(data)

    async def wait_writable(self) -> None:
        await self.connection.wait_writable()

    async def receive(self) -> bytes:
        data = await self.connection.receive()
        self.heard(0.0)
        return data

    def finish(self) -> None:
        self.connection.finish()

    def reset(self) -> None:
        self.connection.reset("the channel was reset")

    @property
    def can_lend(self) -> bool:
        return self.connection.can_lend

    async def lend(self, wake: Callable[[], None]) -> LentConnection | None:
        return await self.connection.lend(wake)

    def heard(self, ago_s: float) -> None:
        link = self._link
        # One that was made since the others were last heard says nothing of them: it may come from
        # another address, or through a router that has forgotten them.
        if self._since_s <= link.last_heard_s:
            link.last_heard_s = max(link.last_heard_s, trio.current_time() - ago_s)
