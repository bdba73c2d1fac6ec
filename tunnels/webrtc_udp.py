"""A UDP socket of trio's for code of asyncio's.

aiortc hands over one datagram at a time, and asyncio makes a system call for each, a quarter of
what a round trip took where it was profiled. Here what is sent until the loop has done its work
leaves in runs, and what has arrived is handed on together (udp.py says how).
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import trio

from tunnels.binding import Address
from tunnels.udp import UdpSocket

MAX_UNSENT = 512  # datagrams: beyond, the network is said to drop


class DatagramProtocol(Protocol):
    """asyncio's."""

    def connection_made(self, transport: Any) -> None: ...

    def connection_lost(self, exc: Exception | None) -> None: ...

    def datagram_received(self, data: bytes, addr: Address) -> None: ...


class DatagramTransport:
    """What asyncio calls one. on_unsent: `flush` is to be called soon. call_soon: asyncio's."""

    def __init__(
        self,
        address: Address,
        protocol: DatagramProtocol,
        call_soon: Callable[..., object],
        on_unsent: Callable[[DatagramTransport], None],
    ) -> None:
        """Raises OSError: nothing can be bound there."""
        family, _, _, _, place = socket.getaddrinfo(
            *address, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST
        )[0]
        sock = socket.socket(family, socket.SOCK_DGRAM)
        try:
            sock.bind(place)
        except BaseException:
            sock.close()
            raise
        self._known = {"socket": sock, "sockname": sock.getsockname()}
        self._socket = UdpSocket(sock, may_fragment=True)
        self._protocol = protocol
        self._call_soon = call_soon
        self._on_unsent = on_unsent
        self._unsent: list[tuple[Address, bytes]] = []
        self._closed = False
        protocol.connection_made(self)

    async def run(self, on_arrived: Callable[[], object]) -> None:
        """Until it is closed. on_arrived: asyncio has something to do."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_when_there_is_room)
                with contextlib.suppress(trio.ClosedResourceError):
                    while True:
                        self._call_soon(self._hand_on, await self._socket.receive())
                        on_arrived()
                nursery.cancel_scope.cancel()
        finally:
            self.close()

    def flush(self) -> None:
        unsent, self._unsent = self._unsent, []
        for to, group in itertools.groupby(unsent, key=_to):
            self._socket.send([data for _, data in group], to)

    async def _send_when_there_is_room(self) -> None:
        with contextlib.suppress(trio.ClosedResourceError):
            await self._socket.flush()

    def _hand_on(self, batch: Sequence[tuple[bytes, Address]]) -> None:
        for data, sender in batch:
            if not self._closed:
                self._protocol.datagram_received(data, sender)

    # --- what asyncio's code calls ------------------------------------------------------

    def sendto(self, data: bytes, addr: Address) -> None:
        if not self._unsent:
            self._on_unsent(self)
        if len(self._unsent) < MAX_UNSENT:
            self._unsent.append((addr[:2], bytes(data)))

    def close(self) -> None:
        """What has been sent before leaves."""
        if not self._closed:
            self._closed = True
            self.flush()
            self._socket.close()
            self._call_soon(self._protocol.connection_lost, None)

    def is_closing(self) -> bool:
        return self._closed

    def get_extra_info(self, name: str, default: object = None) -> object:
        return self._known.get(name, default)


def _to(one: tuple[Address, bytes]) -> Address:
    return one[0]
