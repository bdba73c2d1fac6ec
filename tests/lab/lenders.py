"""Workers that lend, real but for their rpc-servers (stand_in.py), and who borrows from them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trio

from meshnode.config import LendConfig
from meshnode.engine.devices import cpu_device
from meshnode.errors import NetworkError
from meshnode.events import Event
from meshnode.models.manifest import Manifest, to_wire
from meshnode.models.shelf import Shelf
from meshnode.pipeline.borrow import Borrowed, borrow
from meshnode.pipeline.inventory import Inventory
from meshnode.pipeline.lease import Lease, LeaseDesk
from meshnode.pipeline.protocol import PUSH_SERVICE, LeaseRequest
from tests.engine.synthetic import make_model
from tests.lab.stand_in import make_engine
from tunnels import Endpoint, Identity, PeerId, Session

MEMORY_BYTES = 1 << 20
SOON_S = 20


def nothing_told(_event: Event) -> None:
    pass


@dataclass
class Lender:
    """A worker. `knows`: where it can reach others, as it knows itself."""

    name: str
    desk: LeaseDesk
    endpoint: Endpoint
    knows: dict[PeerId, Session] = field(default_factory=dict)

    @property
    def peer(self) -> PeerId:
        return self.endpoint.peer

    @property
    def lease(self) -> Lease:
        (lease,) = self.desk.leases
        return lease

    async def meet(self, other: Lender) -> Session:
        session = await self.endpoint.connect(other.peer, other.endpoint.candidates())
        self.knows[other.peer] = session
        return session

    async def ask_server(self, words: str) -> bytes:
        """What its rpc-server answers to a line, to the end."""
        async with await trio.open_unix_socket(str(self.lease.socket)) as stream:
            await stream.send_all(words.encode() + b"\n")
            answer = b""
            async for chunk in stream:
                answer += chunk
            return answer


@dataclass
class Borrower:
    """Who borrows from lenders."""

    endpoint: Endpoint
    request: LeaseRequest

    async def session(self, lender: Lender) -> Session:
        return await self.endpoint.connect(lender.peer, lender.endpoint.candidates())

    @asynccontextmanager
    async def borrow(self, lender: Lender) -> AsyncIterator[Borrowed]:
        async with borrow(await self.session(lender), self.request, lambda *_: None) as borrowed:
            yield borrowed


class Town:
    """Where they all are: this machine's loopback, and a folder for each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = make_model(folder / "small.gguf", layers=2, width=64, ffn=64)

    @asynccontextmanager
    async def lender(self, name: str, *, knows_ring: bool = True) -> AsyncIterator[Lender]:
        folder = self._folder / name
        for each in (folder, folder / "run", folder / "manifests", folder / "bin"):
            each.mkdir()
        engine = make_engine(folder / "bin", knows_ring=knows_ring)

        async def reach(peer: PeerId, _owner: PeerId) -> Session:
            if peer not in lender.knows:
                raise NetworkError("nobody of that name is known here")
            return lender.knows[peer]

        def authorize(peer: PeerId, service: str) -> bool:
            lease_id = service.removeprefix(PUSH_SERVICE)
            return lease_id == service or desk.pushing.may_push(peer, lease_id)

        desk = LeaseDesk(
            name=name,
            engine=engine,
            inventory=Inventory(engine, (cpu_device(),)),
            lend=LendConfig(memory_bytes=64 * MEMORY_BYTES, threads=1),
            shelf=Shelf((), folder / "manifests"),
            runtime_folder=folder / "run",
            log_folder=folder,
            emit=nothing_told,
            reach=reach,
        )
        lender = Lender(name, desk, Endpoint(Identity.generate(), authorize=authorize))
        desk.offer_services(lender.endpoint)
        async with trio.open_nursery() as nursery:
            await nursery.start(lender.endpoint.run, "127.0.0.1", 0)
            yield lender
            nursery.cancel_scope.cancel()

    async def manifest(self) -> Manifest:
        """Of the model that is borrowed for."""
        shelf = Shelf((), self._folder)
        return await shelf.manifest(shelf.find(str(self._model)))

    @asynccontextmanager
    async def borrower(self) -> AsyncIterator[Borrower]:
        request = LeaseRequest("stand-in", "small", MEMORY_BYTES, to_wire(await self.manifest()))
        endpoint = Endpoint(Identity.generate(), authorize=lambda _peer, _service: False)
        async with trio.open_nursery() as nursery:
            await nursery.start(endpoint.run, "127.0.0.1", 0)
            yield Borrower(endpoint, request)
            nursery.cancel_scope.cancel()
