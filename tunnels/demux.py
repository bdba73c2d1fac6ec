"""What arrives on the node's one UDP socket, and whose it is: told by its first byte (RFC 9443).

QUIC packets have bit 0x40 set. STUN messages begin with two zero bits and have their magic cookie
(RFC 8489 section 5); our sealed probes begin with PROBE_BYTE, which no other protocol on this
socket uses. All else is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from tunnels.binding import Address, KnownAddresses
from tunnels.stun import is_stun
from tunnels.udp import DatagramSocket, Unreachable

PROBE_BYTE = 0x12
MAX_ADOPTED = 64  # sockets beside the first: each is the way to a peer through a NAT
_QUIC_BIT = 0x40

Received = Callable[[bytes, Address], None]
Batch = Sequence[tuple[bytes, Address]]


class SharedSocket:
    """I hand the datagrams of one socket to those they are for, who neither wait nor raise.

    on_quic, on_stun, on_probe, on_unreachable: set by those who want them.
    """

    def __init__(self, socket: DatagramSocket) -> None:
        self.on_quic: Callable[[Batch], None] = lambda _batch: None
        self.on_stun: Received = lambda _datagram, _sender: None
        self.on_probe: Received = lambda _datagram, _sender: None
        self.answered = KnownAddresses()  # to a peer's key: what we send is welcome there
        self._socket = socket
        self._adopted: dict[Address, DatagramSocket] = {}
        self._nursery: trio.Nursery | None = None

    @property
    def local(self) -> Address:
        return self._socket.local

    @property
    def on_unreachable(self) -> Unreachable | None:
        return self._socket.on_unreachable

    @on_unreachable.setter
    def on_unreachable(self, tell: Unreachable | None) -> None:
        self._socket.on_unreachable = tell

    def send(self, datagrams: Sequence[bytes], to: Address) -> None:
        """Never blocks, never raises: the network may drop."""
        self._adopted.get(to, self._socket).send(datagrams, to)

    def adopt(self, socket: DatagramSocket, remote: Address) -> None:
        """From now on `remote` is talked to through `socket`, which is mine to close."""
        if (old := self._adopted.pop(remote, None)) is not None:
            old.close()
        elif len(self._adopted) >= MAX_ADOPTED:
            self._adopted.pop(next(iter(self._adopted))).close()  # the oldest
        self._adopted[remote] = socket
        if self._nursery is not None:
            self._nursery.start_soon(self._run_adopted, socket)

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for socket in self._adopted.values():
                self._nursery.start_soon(self._run_adopted, socket)
            self._nursery.start_soon(self._socket.flush)
            await self._receive(self._socket)

    def close(self) -> None:
        for socket in (self._socket, *self._adopted.values()):
            socket.close()

    async def _run_adopted(self, socket: DatagramSocket) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(socket.flush)
                await self._receive(socket)
        except* trio.ClosedResourceError:
            pass  # another took its place

    async def _receive(self, socket: DatagramSocket) -> None:
        while True:
            for_quic = []
            for datagram, sender in await socket.receive():
                first = datagram[0] if datagram else 0
                if first & _QUIC_BIT:
                    for_quic.append((datagram, sender))
                elif first == PROBE_BYTE:
                    self.on_probe(datagram, sender)
                elif is_stun(datagram):
                    self.on_stun(datagram, sender)
            if for_quic:
                self.on_quic(for_quic)
