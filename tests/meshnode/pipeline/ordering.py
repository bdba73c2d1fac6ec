"""Three machines, of which one has another pull."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cbor2
import trio

from meshnode.config import PullSource
from meshnode.errors import NetworkError, UsageError
from meshnode.events import Event
from meshnode.models.fetching import Fetcher, OnProgress, nobody
from meshnode.models.peers.directory import Directory
from meshnode.models.peers.service import StoreService
from meshnode.models.peers.source import Holders
from meshnode.models.web import kind_of
from meshnode.pipeline.commission import Held
from meshnode.pipeline.order_desk import PULL_SERVICE, OrderDesk
from meshnode.pipeline.orders import Orders
from meshnode.pipeline.pulling import Puller
from meshnode.pipeline.quota import Quota
from meshnode.pipeline.user_pulls import UserPulls
from tests.lab.holders import Machine
from tests.lab.sources import FileSource
from tunnels import PeerId, Session, Stream

URL = "https://example.org/glm.gguf"
ALL = frozenset(PullSource)


class Gate(FileSource):
    """A web server that stops in the middle, until it is let go."""

    def hold(self) -> None:
        self.reached, self.free = trio.Event(), trio.Event()

    async def read(
        self, file_index: int, start: int, stop: int, into: Callable[[memoryview], None]
    ) -> None:
        if start and hasattr(self, "free"):
            self.reached.set()
            await self.free.wait()
        await super().read(file_index, start, stop, into)


@dataclass
class Scene:
    """`ann` asks `ben`, who reaches a web server, and `cy`, who may have models too."""

    ann: Machine
    ben: Machine
    cy: Machine
    web: Gate
    session: Session
    quota: Quota
    events: list[Event] = field(default_factory=list)

    @property
    def names(self) -> dict[PeerId, str]:
        return {one.endpoint.peer: one.name for one in (self.ann, self.ben, self.cy)}

    def directory(self, machine: Machine) -> Directory:
        sessions = machine.endpoint.sessions
        return Directory(sessions, self._name, machine.offers.listed, machine.name)

    def puller(self, machine: Machine, *, with_peers: bool = True) -> Puller:
        holders = Holders(machine.endpoint.sessions, self._name)
        fetcher = Fetcher(machine.store, self.web.open, holders.find if with_peers else nobody)
        return Puller(fetcher, machine.store, self.directory(machine), machine.offers)

    def allow(self, allowed: frozenset[PullSource]) -> None:
        """What ben's operator does."""
        self.desk = OrderDesk(
            "ben",
            self.puller(self.ben, with_peers=PullSource.PEERS in allowed),
            allowed,
            kind_of,
            self.quota,
            lambda peer: self.names[peer],
            self.events.append,
        )
        self.desk.offer(self.ben.endpoint)

    @property
    def orders(self) -> Orders:
        return Orders(
            self._named, lambda peer: self.names[peer], self._reach, self.directory(self.ann)
        )

    async def order(
        self, source: str, layers: str | None = None, tell: OnProgress = lambda _d, _t: None
    ) -> Held:
        return await self.orders.pull("ben", source, layers, tell)

    @property
    def user_pulls(self) -> UserPulls:
        """As ann's commands have it."""
        return UserPulls("ann", str(self.ann.endpoint.peer), self.puller(self.ann), self.orders)

    async def until_nothing_is_pulled(self) -> None:
        with trio.fail_after(20):
            while self.quota._promised:  # noqa: ASYNC110 - nobody is told of that
                await trio.sleep(0.01)

    def _name(self, session: Session) -> str:
        return self.names[session.peer]

    def _named(self, text: str) -> PeerId:
        for peer, name in self.names.items():
            if text in (name, str(peer)) and name != "ann":
                return peer
        raise UsageError(f"there is no peer {text!r}: `mesh members` lists those known")

    async def _reach(self, peer: PeerId) -> Session:
        if peer != self.session.peer:
            raise NetworkError(f"{self.names[peer]} is not connected")
        return self.session


@asynccontextmanager
async def scene(folder: Path, model: Path) -> AsyncIterator[Scene]:
    ann, ben, cy = (Machine(name, folder / name) for name in ("ann", "ben", "cy"))
    async with trio.open_nursery() as nursery:
        for machine in (ann, ben, cy):
            StoreService(machine.offers).offer(machine.endpoint)
            await nursery.start(machine.endpoint.run, "127.0.0.1", 0)
        session = await ann.endpoint.connect(ben.endpoint.peer, ben.endpoint.candidates())
        await ben.endpoint.connect(cy.endpoint.peer, cy.endpoint.candidates())
        stage = Scene(ann, ben, cy, Gate(model), session, Quota(ben.store))
        stage.allow(ALL)
        yield stage
        nursery.cancel_scope.cancel()


async def say(stage: Scene, *messages: dict[str, Any]) -> Stream:
    stream = await stage.session.open(PULL_SERVICE)
    for message in messages:
        body = cbor2.dumps(message)
        await stream.send_all(len(body).to_bytes(4, "big") + body)
    return stream
