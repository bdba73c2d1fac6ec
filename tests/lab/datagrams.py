"""Fake worlds: hosts with addresses, and a network between them that misbehaves.

Datagrams are here, TCP connections in connections.py, NATs and firewalls between in nats.py.

Everything is in memory and moves with trio's clock; under a MockClock a minute of bad weather
takes as long as its arithmetic. The dice are seeded: the same world drops the same datagrams.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import trio

from tests.lab.connections import FakeListener, connect
from tunnels.binding import Address
from tunnels.errors import ListenFailed
from tunnels.tcp_socket import ByteSocket, Listener
from tunnels.udp import Unreachable

if TYPE_CHECKING:
    from tests.lab.nats import Internet, Network

QUEUE_DATAGRAMS = 4096  # of a socket; beyond, the newest are lost, as in a kernel


@dataclass(frozen=True)
class Weather:
    """What the network does to each datagram.

    delay_s: every datagram takes at least this long. jitter_s: and up to this much more, each
    its own, so that they overtake one another. loss, duplication: probabilities.
    carries: larger datagrams get lost without a word.
    """

    delay_s: float = 0.01
    jitter_s: float = 0.0
    loss: float = 0.0
    duplication: float = 0.0
    carries: int = 65535


@dataclass(order=True)
class _Flight:
    lands_at_s: float
    number: int
    land: Callable[[], None] = field(compare=False)


class World:
    """I carry datagrams between my hosts."""

    def __init__(self, weather: Weather | None = None, seed: int = 0) -> None:
        self.weather = weather or Weather()
        self.cut = False  # while True nothing arrives
        self.sent = 0
        self.lost = 0
        self.refusing: set[Address] = set()  # ports that answer with an ICMP error
        self.log: list[tuple[Address, bytes]] = []  # (target, datagram) when `record` is set
        self.record = False
        self.tcp_blocked = False  # as by a firewall that drops what would begin a connection
        self.unplugged: set[str] = set()  # hosts
        self.without_udp: set[str] = set()  # hosts behind a firewall that drops it
        self.hidden: set[str] = set()  # hosts whose firewall lets in what they asked for
        self._asked: set[tuple[Address, Address]] = set()
        self.era = 0  # of TCP connections: those of an earlier one lead nowhere
        self.seen_as: dict[Address, Address] = {}  # senders behind a NAT, as others see them
        self.listeners: dict[Address, FakeListener] = {}
        self.internet: Internet | None = None  # None: each host sees every other
        self.seed = seed
        self.dice = random.Random(seed)
        self._sockets: dict[Address, FakeSocket] = {}
        self._flights: list[_Flight] = []
        self._departed = trio.Event()
        self._number = 0
        self._next_port = 40000

    def host(self, *addresses: str) -> FakeHost:
        return FakeHost(self, list(addresses))

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            deadline = self._flights[0].lands_at_s if self._flights else float("inf")
            with trio.move_on_at(deadline):
                await self._departed.wait()
            self._departed = trio.Event()
            while self._flights and self._flights[0].lands_at_s <= trio.current_time():
                heapq.heappop(self._flights).land()

    def later(self, at_s: float, land: Callable[[], None]) -> None:
        """Do something when the time has come; what was said first is done first."""
        self._number += 1
        heapq.heappush(self._flights, _Flight(at_s, self._number, land))
        self._departed.set()

    def inject(self, datagram: bytes, sender: Address, target: Address) -> None:
        """A datagram out of nowhere, at once."""
        if (socket := self._sockets.get(target)) is not None:
            socket.arrive(datagram, sender)

    def depart(self, datagram: bytes, sender: Address, target: Address) -> None:
        self.sent += 1
        self._asked.add((sender, target))
        if self.record:
            self.log.append((target, datagram))
        if target in self.refusing:
            self._refuse(sender, target)
            return
        source, network = sender, None
        if self.internet is not None:
            if (climbed := self.internet.climb(sender, target)) is None:
                self.lost += 1
                return
            source, network = climbed
        if len(datagram) > self.weather.carries:
            self.lost += 1
            return
        copies = 2 if self.dice.random() < self.weather.duplication else 1
        for _ in range(copies):
            if self.dice.random() < self.weather.loss:
                self.lost += 1
                continue
            takes_s = self.weather.delay_s + self.dice.random() * self.weather.jitter_s
            land = partial(self._land, datagram, source, target, network, sender)
            self.later(trio.current_time() + takes_s, land)

    def bind(self, address: Address) -> FakeSocket:
        host, port = address
        port = port or self.free_port()
        if (host, port) in self._sockets:
            raise ListenFailed(f"cannot listen on UDP {host}:{port}: the port is in use")
        socket = self._sockets[host, port] = FakeSocket(self, (host, port))
        return socket

    def free_port(self) -> int:
        self._next_port += 1
        return self._next_port

    def unbind(self, address: Address) -> None:
        self._sockets.pop(address, None)

    def unplug(self, host: str) -> None:
        """The machine is gone: nothing reaches it, nothing leaves it."""
        self.unplugged.add(host)
        for address in [one for one in self._sockets if one[0] == host]:
            self._sockets.pop(address).unplugged = True

    def plug_in(self, host: str) -> None:
        """The machine is back, with nothing of what ran on it."""
        self.unplugged.discard(host)

    def rebind(self, inside: Address, outside: Address) -> None:
        """The NAT before that socket forgets what it knew, and gives it another address."""
        self.seen_as[inside] = outside
        self.era += 1

    def move(self, host: FakeHost, address: str) -> None:
        """The machine has another address in place of its only one: sockets stay, the connections
        of the old address lead nowhere."""
        [old] = host.addresses
        host.addresses[:] = [address]
        self.unplugged.add(old)
        if self.internet is not None:
            self.internet.move(old, address)
        for where in [one for one in self._sockets if one[0] == old]:
            socket = self._sockets.pop(where)
            socket.local = (address, where[1])
            self._sockets[socket.local] = socket
        for where in [one for one in self.listeners if one[0] == old]:
            self.listeners[address, where[1]] = listener = self.listeners.pop(where)
            listener.move(address)
        host.changes.unpark_all()

    def _refuse(self, sender: Address, target: Address) -> None:
        socket = self._sockets.get(sender)
        if socket is not None and socket.on_unreachable is not None:
            socket.on_unreachable(target, "refused: no node listens on that port")

    def _land(
        self,
        datagram: bytes,
        sender: Address,
        target: Address,
        network: Network | None,
        origin: Address,
    ) -> None:
        insides = {outside: inside for inside, outside in self.seen_as.items()}
        lands_at: Address | None = insides.get(target, target)
        if self.internet is not None and network is not None:
            lands_at = self.internet.descend(sender, target, network)
            if lands_at is None and not self.cut and self.internet.refuses(target):
                self._refuse(origin, target)
        unasked = target[0] in self.hidden and (target, sender) not in self._asked
        if self.cut or lands_at is None or unasked or {sender[0], target[0]} & self.without_udp:
            self.lost += 1
        elif (socket := self._sockets.get(lands_at)) is not None:
            socket.arrive(datagram, self.seen_as.get(sender, sender))


@dataclass
class FakeHost:
    """One machine: a tunnels.network.Network. near: hosts beginning so are on its LAN."""

    world: World
    addresses: list[str]
    near: str | None = None
    changes: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    def bind(self, host: str | None, port: int) -> FakeSocket:
        return self.world.bind((host or self.addresses[0], port))

    def listen(self, host: str | None, port: int) -> Listener:
        return FakeListener(self.world, (host or self.addresses[0], port))

    async def connect(self, to: Address) -> ByteSocket:
        return await connect(self.world, self.addresses[0], to)

    async def watch(self, changed: Callable[[], None]) -> None:
        while True:
            await self.changes.park()
            changed()

    def interface_addresses(self) -> list[str]:
        return list(self.addresses)

    def is_near(self, host: str) -> bool:
        return self.near is not None and host.startswith(self.near)


class FakeSocket:
    """A tunnels.udp.DatagramSocket."""

    def __init__(self, world: World, local: Address) -> None:
        self.local = local
        self.on_unreachable: Unreachable | None = None
        self._world = world
        self._arrived: list[tuple[bytes, Address]] = []
        self._readers = trio.lowlevel.ParkingLot()
        self._closed = False
        self.unplugged = False

    def send(self, datagrams: Sequence[bytes], to: Address) -> None:
        for datagram in datagrams if not self.unplugged else ():
            self._world.depart(bytes(datagram), self.local, to)

    async def receive(self) -> Sequence[tuple[bytes, Address]]:
        await trio.lowlevel.checkpoint()
        while not self._arrived:
            if self._closed:
                raise trio.ClosedResourceError
            await self._readers.park()
        batch, self._arrived = self._arrived, []
        return batch

    async def flush(self) -> None:
        await trio.sleep_forever()

    def close(self) -> None:
        self._closed = True
        self._world.unbind(self.local)
        self._readers.unpark_all()

    def arrive(self, datagram: bytes, sender: Address) -> None:
        if len(self._arrived) < QUEUE_DATAGRAMS:
            self._arrived.append((datagram, sender))
            self._readers.unpark_all()
