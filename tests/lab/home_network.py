"""A network with a router, and a node in it whose ports are mapped."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio
import trio.testing

from discovery.gateway import Gateway
from discovery.portmap import PortMap, PortMapStatus
from tests.discovery.routers import OURS, OUTSIDE
from tests.lab.datagrams import Weather, World
from tests.lab.routers import EVERYTHING, Router
from tunnels.peer import Candidate

PORTS = {"quic": 4242, "tcp": 4242}
BOTH_OPEN = {("UDP", 4242): (OURS, 4242), ("TCP", 4242): (OURS, 4242)}
BOTH = [Candidate(kind, OUTSIDE, 4242, "mapped") for kind in ("quic", "tcp")]
Clock = trio.testing.MockClock


@dataclass
class Home:
    """A network with a router, and a node in it."""

    world: World
    router: Gateway | None
    portmap: PortMap
    nursery: trio.Nursery
    scope: trio.CancelScope
    told: list[PortMapStatus]
    changed: list[trio.Event] = field(default_factory=lambda: [trio.Event()])

    def change_network(self) -> None:
        self.changed.pop().set()
        self.changed.append(trio.Event())


@asynccontextmanager
async def at_home(
    *routers: Router, world: World | None = None, only_host: str | None = None
) -> AsyncIterator[Home]:
    """The node's default route leads to the first router."""
    world = world or (routers[0].world if routers else World(Weather(delay_s=0.001)))
    told: list[PortMapStatus] = []

    async def gateway() -> Gateway | None:
        return home.router

    async def wait_changed() -> None:
        await home.changed[-1].wait()

    portmap = PortMap(
        lambda: PORTS,
        only_host=only_host,
        network=world.host(OURS),
        gateway=gateway,
        watch=wait_changed,
        tell=told.append,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.run)
        for router in routers:
            nursery.start_soon(router.run)
        await trio.testing.wait_all_tasks_blocked()
        scope = trio.CancelScope()
        first = routers[0].gateway() if routers else None
        home = Home(world, first, portmap, nursery, scope, told)
        stopped = trio.Event()

        async def run() -> None:
            with scope:
                await portmap.run()
            stopped.set()

        nursery.start_soon(run)
        await portmap.settled.wait()
        yield home
        scope.cancel()
        await stopped.wait()
        nursery.cancel_scope.cancel()


def a_router(*speaks: str, **traits: object) -> Router:
    router = Router(World(Weather(delay_s=0.001)), speaks or EVERYTHING)
    for name, value in traits.items():
        setattr(router, name, value)
    return router
