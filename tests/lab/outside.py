"""A node behind a NAT made of memory that asks servers how it looks from outside."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import trio
import trio.testing

from tests.lab.datagrams import FakeSocket, World
from tests.lab.nats import Internet, Kind, Router
from tunnels.binding import Address
from tunnels.demux import SharedSocket
from tunnels.outside import OutsideView
from tunnels.stun import Server, Success, encode
from tunnels.stun_port import StunPort
from tunnels.udp import Unreachable

HOME, HOME6 = "192.168.1.2", "2001:db8:1::2"
WAN = "11.0.0.1"
PORT = 4433
STUN_PORT = 3478
A, B, C = "11.0.1.1", "11.0.1.2", "11.0.1.3"
A6, B6 = "2001:db8:a::1", "2001:db8:b::1"


def router(nat: str, *, keeps_port: bool = True) -> Router:
    """Of the NAT kind as a user would name it."""
    kind = {"easy": Kind.PORT_RESTRICTED, "hard": Kind.SYMMETRIC}.get(nat, Kind.FIREWALL)
    made = Router(WAN, kind, blocks_udp=nat == "blocked")
    if not keeps_port:
        made.rebind()
    return made


class Everywhere:
    """A socket bound to every address of its machine."""

    def __init__(self, socket: FakeSocket) -> None:
        self.local = ("::", PORT)
        self.on_unreachable: Unreachable | None = None
        self.send, self.receive = socket.send, socket.receive
        self.flush, self.close = socket.flush, socket.close


class View(OutsideView):
    """With an event for its changes, another one after each."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._on_change = self._tell
        self.changed = trio.Event()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@dataclass
class Lab:
    internet: Internet
    nursery: trio.Nursery
    names: dict[str, Sequence[Address]] = field(default_factory=dict)
    slow_names: frozenset[str] = frozenset()

    @property
    def world(self) -> World:
        return self.internet.world

    async def resolve(self, server: Server) -> Sequence[Address]:
        if server.host in self.slow_names:
            await trio.sleep(5)
        return self.names.get(server.host, [(server.host, server.port)])

    def add_server(self, host: str, says: Address | None = None) -> None:
        """A node that answers, with the truth or with what it `says`."""
        socket = SharedSocket(self.internet.host(host).bind(None, STUN_PORT))

        def lie(datagram: bytes, sender: Address) -> None:
            assert says is not None
            socket.send([encode(Success(datagram[8:20], says))], sender)

        if says is None:
            StunPort(socket)
        else:
            socket.on_stun = lie
        self.nursery.start_soon(socket.run)

    def view(
        self,
        nat: str,
        servers: Collection[str] | None,
        *,
        keeps_port: bool = True,
        own: Sequence[str] = (HOME,),
        peers: Sequence[Address] = (),
        near: str | None = None,
    ) -> tuple[View, Router]:
        """A node behind a router, running."""
        before = router(nat, keeps_port=keeps_port)
        host = self.internet.host(*own, behind=self.internet.network(before), near=near)
        shared = SharedSocket(Everywhere(host.bind(None, PORT)))
        asked = None if servers is None else [Server(one, STUN_PORT) for one in servers]
        view = View(host, asked, lambda: peers, resolve=self.resolve)
        self.nursery.start_soon(shared.run)
        port = StunPort(shared)
        self.nursery.start_soon(port.run)
        self.nursery.start_soon(view.run, port)
        return view, before

    def asked_at(self, *hosts: str) -> int:
        """How many questions came to these servers since the last call."""
        count = sum(to[0] in hosts and to[1] == STUN_PORT for to, _ in self.world.log)
        self.world.log.clear()
        return count


@asynccontextmanager
async def lab() -> AsyncIterator[Lab]:
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            world = World()
            world.record = True
            nursery.start_soon(world.run)
            yield Lab(Internet(world), nursery)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def behind_easy_nat() -> AsyncIterator[tuple[Lab, View, Router]]:
    """A node that knows how it looks from outside: two servers have answered."""
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, nat = world.view("easy", [A, B])
        await view.checked.wait()
        yield world, view, nat
