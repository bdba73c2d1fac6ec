"""A network that ends where our own interfaces' networks end: what lies beyond gets no packet.

The address policy refuses to dial there (dial.py, `only`); this is what holds whoever else has the
socket: answers to strangers, probes, questions. Only the kernel's own words on a TCP connection
that somebody beyond has begun are not ours to keep back; it is closed at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

import trio

from tunnels.binding import Address
from tunnels.dial import BEYOND
from tunnels.errors import LinkClosed
from tunnels.network import HostNetwork
from tunnels.tcp_socket import ByteSocket, Listener
from tunnels.udp import DatagramSocket, Unreachable

FRESH_S = 5.0  # what is near may change with the interfaces
MAX_KNOWN = 4096


class NearNetwork(HostNetwork):
    """This machine's network, near addresses only."""

    def bind(self, host: str | None, port: int) -> DatagramSocket:
        return NearSocket(super().bind(host, port), self.is_near)

    def listen(self, host: str | None, port: int) -> Listener:
        return NearListener(super().listen(host, port), self.is_near)

    async def connect(self, to: Address) -> ByteSocket:
        if not self.is_near(to[0]):
            raise LinkClosed(f"not tried: {BEYOND}")
        return await super().connect(to)


class NearSocket:
    """A tunnels.udp.DatagramSocket that neither hears nor reaches what is not near."""

    def __init__(self, socket: DatagramSocket, is_near: Callable[[str], bool]) -> None:
        self._socket = socket
        self._is_near = is_near
        self._known: dict[str, bool] = {}
        self._known_until_s = 0.0

    @property
    def on_unreachable(self) -> Unreachable | None:
        return self._socket.on_unreachable

    @on_unreachable.setter
    def on_unreachable(self, tell: Unreachable | None) -> None:
        self._socket.on_unreachable = tell

    @property
    def local(self) -> Address:
        return self._socket.local

    def send(self, datagrams: Sequence[bytes], to: Address) -> None:
        if self._may_reach(to[0]):
            self._socket.send(datagrams, to)

    async def receive(self) -> Sequence[tuple[bytes, Address]]:
        while True:
            batch = await self._socket.receive()
            if near := [one for one in batch if self._may_reach(one[1][0])]:
                return near

    async def flush(self) -> None:
        await self._socket.flush()

    def close(self) -> None:
        self._socket.close()

    def _may_reach(self, host: str) -> bool:
        """Remembered: a look at the interfaces takes 0.1 ms, and there are many datagrams."""
        now = trio.current_time()
        if now >= self._known_until_s or len(self._known) >= MAX_KNOWN:
            self._known.clear()
            self._known_until_s = now + FRESH_S
        if host not in self._known:
            self._known[host] = self._is_near(host)
        return self._known[host]


class NearListener:
    """A tunnels.tcp_socket.Listener that turns away whoever is not near."""

    def __init__(self, listener: Listener, is_near: Callable[[str], bool]) -> None:
        self._listener = listener
        self._is_near = is_near

    @property
    def local(self) -> Address:
        return self._listener.local

    async def accept(self) -> ByteSocket:
        while True:
            socket = await self._listener.accept()
            if self._is_near(socket.remote[0]):
                return socket
            with contextlib.suppress(OSError):
                socket.reset()

    def close(self) -> None:
        self._listener.close()
