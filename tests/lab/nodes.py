"""Endpoints in a fake world, ready to talk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.lab.datagrams import FakeHost, Weather, World
from tunnels import Candidate, Endpoint, Identity, PeerId, Session, Stream, TunnelError
from tunnels.relay import Carries

KINDS: Collection[str] = ("quic",)  # of links between `two_nodes`; a fixture sets it
REAL_KIND = "webrtc"  # runs over real sockets, whatever the world
PATIENCE_S = 300.0  # of fake time: pings would keep a world that waits in vain alive for ever


def identity(name: str) -> Identity:
    """The same key for the same name, every time."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


def anyone(peer: PeerId, service: str) -> bool:
    return True


@dataclass
class Node:
    """An endpoint that runs on a host of the world until `stop`; over a REAL_KIND on loopback."""

    endpoint: Endpoint
    host: FakeHost
    scope: trio.CancelScope

    def stop(self) -> None:
        """Leave as Ctrl-C does: with a goodbye."""
        self.scope.cancel()

    def kill(self) -> None:
        """Leave as kill -9 does: without a word."""
        for address in self.host.addresses:
            self.host.world.unplug(address)
        self.scope.cancel()


@dataclass
class Pair:
    world: World
    alice: Node
    bob: Node
    nursery: trio.Nursery
    rita: Node | None = None  # the relay between the two

    def guests(self) -> list[Session]:
        """Bob's sessions, but for the one with the relay."""
        relay = self.rita and self.rita.endpoint.peer
        return [one for one in self.bob.endpoint.sessions() if one.peer != relay]

    async def connect(self) -> Session:
        """alice dials bob."""
        bob = self.bob.endpoint
        session = await self.alice.endpoint.connect(bob.peer, bob.candidates())
        while (REAL_KIND,) == KINDS and [one.link.kind for one in session._links] != [REAL_KIND]:
            await session.wait_links_changed()
        return session


async def start_node(
    nursery: trio.Nursery,
    host: FakeHost,
    name: str,
    *,
    port: int = 0,
    dead_after_s: float = 10.0,
    **options: object,
) -> Node:
    options.setdefault("authorize", anyone)
    is_real = options.get("transports") == (REAL_KIND,)
    endpoint = Endpoint(
        identity(name),
        network=None if is_real else host,
        dead_after_s=dead_after_s,
        **options,  # type: ignore[arg-type]
    )
    scope = trio.CancelScope()

    async def run(task_status: trio.TaskStatus[int]) -> None:
        with scope:
            bound = "127.0.0.1" if is_real else None
            await endpoint.run(bound, port, task_status=task_status)

    await nursery.start(run)
    return Node(endpoint, host, scope)


async def start_relay(
    nursery: trio.Nursery, host: FakeHost, name: str, *, port: int = 0, **options: object
) -> Node:
    options.setdefault("carries", Carries.TRAFFIC)
    return await start_node(nursery, host, name, port=port, **options)  # type: ignore[arg-type]


async def reach_through(relay: Node, *members: Node) -> None:
    """Each of `members` can be reached through `relay`, as long as both run."""
    for one in members:
        places = relay.endpoint.candidates()
        session = await one.endpoint.connect(relay.endpoint.peer, places)
        assert one.endpoint._nursery is not None
        direct = [place for place in places if place.via is None]
        await one.endpoint._nursery.start(keep_reserved, one, session, direct)


async def keep_reserved(
    member: Node,
    session: Session,
    places: Sequence[Candidate],
    *,
    task_status: trio.TaskStatus[object] = trio.TASK_STATUS_IGNORED,
) -> None:
    with contextlib.suppress(TunnelError):
        await member.endpoint.relaying.reserve(session, places, task_status.started)


@asynccontextmanager
async def two_nodes(
    weather: Weather | None = None,
    seed: int = 0,
    dead_after_s: float = 10.0,
) -> AsyncIterator[Pair]:
    """alice at 11.0.0.1 and bob at 11.0.0.2, in one world, with links of the KINDS; where that is
    "relay", through rita at 11.0.0.9."""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            world = World(weather, seed)
            nursery.start_soon(world.run)
            alice = await start_node(
                nursery,
                world.host("11.0.0.1"),
                "alice",
                dead_after_s=dead_after_s,
                transports=KINDS,
            )
            bob = await start_node(
                nursery,
                world.host("11.0.0.2"),
                "bob",
                dead_after_s=dead_after_s,
                transports=KINDS,
            )
            rita = None
            if "relay" in KINDS:
                host = world.host("11.0.0.9")
                rita = await start_relay(nursery, host, "rita", dead_after_s=dead_after_s)
                await reach_through(rita, alice, bob)
            yield Pair(world, alice, bob, nursery, rita)
            nursery.cancel_scope.cancel()


async def echo(stream: Stream) -> None:
    while data := await stream.receive_some():
        await stream.send_all(data)
    await stream.send_eof()


async def exchange(stream: Stream, data: bytes) -> bytes:
    """Send all of `data`, then the end; meanwhile read until the other side's end."""
    received = bytearray()

    async def send() -> None:
        await stream.send_all(data)
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        while piece := await stream.receive_some():
            received += piece
    return bytes(received)
