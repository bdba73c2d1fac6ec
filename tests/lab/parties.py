"""Nodes reduced to membership, in a world made of memory with a clock of its own."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cbor2
import trio
import trio.testing

from discovery.grants import Role
from discovery.token import Token
from meshnode.administration import Administration
from meshnode.connections import Connections
from meshnode.events import Event, Kind
from meshnode.ledger import Ledger
from meshnode.membership import Membership
from meshnode.messages import MessageStream
from meshnode.state import Home
from tests.lab.datagrams import FakeHost, World
from tunnels import Endpoint, Identity, PeerId, Session, Stream
from tunnels.relay import Carries

START_S = time.time()
PORT = 4433
ON_HEARING_S = 1.0
"""Within which a removal counts, from the moment a node has heard of it."""


class Wall:
    """The clock on a node's wall: it goes with trio's and may be set."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return START_S + trio.current_time() + self.ahead_s


@dataclass
class Party:
    """A node reduced to membership, on a host of the world."""

    name: str
    home: Home
    endpoint: Endpoint
    membership: Membership
    connections: Connections
    nursery: trio.Nursery
    wall: Wall
    events: list[Event] = field(default_factory=list)

    @property
    def peer(self) -> PeerId:
        return self.endpoint.peer

    @property
    def ledger(self) -> Ledger:
        return self.membership.ledger

    @property
    def mesh(self) -> bytes:
        """The one it founded."""
        return self.ledger.own_mesh

    @property
    def desk(self) -> Administration:
        return Administration(self.membership, self.connections.joining, self.endpoint.candidates)

    def invite(self, role: Role = Role.PEER, mesh: bytes | None = None) -> Token:
        places = self.endpoint.candidates()
        return self.connections.joining.invite(
            places, role=role, lifetime_s=3600, uses=9, mesh=mesh
        )

    def run_connections(self) -> None:
        self.nursery.start_soon(self.connections.run, ())

    def tells(self) -> list[tuple[object, object]]:
        """Who came and went, as its user was told."""
        peers = [event.data for event in self.events if event.kind is Kind.PEER]
        return [
            (data["name"], data["up"])
            for data in peers
            if not {"removed", "interrupted"} & set(data)
        ]

    def warnings(self) -> str:
        return "\n".join(event.text for event in self.events if event.kind is Kind.WARNING)

    def knows(self, other: Party) -> bool:
        return self.membership.is_introduced(other.peer)

    def lets_in(self, other: Party, service: str = "control") -> bool:
        return self.membership.authorize(other.peer, service)

    def session(self, other: Party) -> Session:
        session = self.endpoint.session(other.peer)
        assert session is not None
        return session

    def stop(self) -> None:
        """As Ctrl-C does; its home is free again."""
        self.nursery.cancel_scope.cancel()
        self.home.__exit__(None, None, None)

    async def dial(self, other: Party) -> Session:
        return await self.endpoint.connect(other.peer, other.endpoint.candidates())

    async def introduce_to(self, other: Party) -> None:
        places = self.endpoint.candidates()
        await self.connections.introductions.introduce(self.session(other), places)

    async def meet(self, other: Party) -> None:
        await self.dial(other)
        await self.introduce_to(other)


@asynccontextmanager
async def party(
    folder: Path,
    host: FakeHost | None,
    name: str,
    *,
    carries: Carries = Carries.INTRODUCTIONS,
    **more: Any,
) -> AsyncIterator[Party]:
    """A node on the home `folder/name` while the block lasts, or until it is stopped. host: None
    for the loopback of this machine. more: for its Endpoint."""
    with Home(folder / name) as home:
        identity = Identity.load_or_create(home.folder / "node.key")
        wall = Wall()
        members = Membership(home, identity, name, wall)
        where = (None, PORT) if host else ("127.0.0.1", 0)
        endpoint = Endpoint(
            identity, authorize=members.authorize, network=host, carries=carries, **more
        )
        events: list[Event] = []
        kept = Connections(endpoint, members, events.append)
        kept.offer_services()
        async with trio.open_nursery() as block:
            nursery = await block.start(_nursery_of_its_own)
            await nursery.start(endpoint.run, *where)
            yield Party(name, home, endpoint, members, kept, nursery, wall, events)
            block.cancel_scope.cancel()


async def _nursery_of_its_own(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    """Cancelled, it ends the node's tasks; the block, a test's own, goes on."""
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()


@asynccontextmanager
async def world_of_parties() -> AsyncIterator[World]:
    """A world that ends, so that a test that waits in vain does too."""
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            world = World()
            nursery.start_soon(world.run)
            yield world
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def parties(folder: Path, *names: str) -> AsyncIterator[list[Party]]:
    async with world_of_parties() as world, AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(party(folder, world.host(f"11.0.0.{n + 1}"), name))
            for n, name in enumerate(names)
        ]


@dataclass
class Sent:
    """One message between nodes."""

    to: PeerId
    service: str
    message: dict[str, Any]

    def mentions(self, key: bytes) -> bool:
        return key in cbor2.dumps(self.message)


@contextmanager
def recorded_messages() -> Iterator[list[Sent]]:
    """Every message that any node of this process sends while the block lasts."""
    sent: list[Sent] = []
    send = MessageStream.send

    async def record(messages: MessageStream, message: dict[str, Any]) -> None:
        stream = messages._stream
        assert isinstance(stream, Stream)
        sent.append(Sent(stream.peer, stream.service, dict(message)))
        await send(messages, message)

    with patch.object(MessageStream, "send", record):
        yield sent


async def echo(stream: Stream) -> None:
    async for chunk in stream:
        await stream.send_all(chunk)


def run_all(*nodes: Party) -> None:
    for node in nodes:
        node.endpoint.serve("control", echo)
        node.run_connections()


async def join(inviter: Party, *joiners: Party, role: Role = Role.PEER) -> None:
    for joiner in joiners:
        await joiner.connections.join(inviter.invite(role))


def remove(remover: Party, removed: Party) -> None:
    remover.desk.answer({"op": "remove", "peer": str(removed.peer)})


@asynccontextmanager
async def ring(folder: Path, *names: str) -> AsyncIterator[list[Party]]:
    """A founder and members of its mesh, all connected with all, all running."""
    async with parties(folder, *names) as nodes:
        founder, *members = nodes
        run_all(*nodes)
        await trio.testing.wait_all_tasks_blocked()
        await join(founder, *members)
        for n, one in enumerate(members):
            for other in members[n + 1 :]:
                session = await one.dial(other)
                places = one.endpoint.candidates()
                await one.connections.introductions.introduce(session, places, [founder.mesh])
        await trio.sleep(1)
        yield nodes


@asynccontextmanager
async def ring_of(world: World, folder: Path, *names: str) -> AsyncIterator[list[Party]]:
    """Nodes, each at the address that goes with its name."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(
                party(folder, world.host(f"11.0.0.{sum(name.encode()) % 250 + 1}"), name)
            )
            for name in names
        ]
