"""Endpoints in a fake world, ready to talk."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from tests.lab.datagrams import FakeHost, Weather, World
from tunnels import Endpoint, Identity, PeerId, Session, Stream

KINDS: Collection[str] = ("quic",)  # of links between `two_nodes`; a fixture sets it
PATIENCE_S = 300.0  # of fake time: pings would keep a world that waits in vain alive for ever


def identity(name: str) -> Identity:
    """The same key for the same name, every time."""
    return Identity(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()))


def anyone(peer: PeerId, service: str) -> bool:
    return True


@dataclass
class Node:
    """An endpoint that runs on a host of the world until `stop`."""

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

    async def connect(self) -> Session:
        """alice dials bob."""
        bob = self.bob.endpoint
        return await self.alice.endpoint.connect(bob.peer, bob.candidates())


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
    endpoint = Endpoint(
        identity(name),
        network=host,
        dead_after_s=dead_after_s,
        **options,  # type: ignore[arg-type]
    )
    scope = trio.CancelScope()

    async def run(task_status: trio.TaskStatus[int]) -> None:
        with scope:
            await endpoint.run(None, port, task_status=task_status)

    await nursery.start(run)
    return Node(endpoint, host, scope)


@asynccontextmanager
async def two_nodes(
    weather: Weather | None = None,
    seed: int = 0,
    dead_after_s: float = 10.0,
) -> AsyncIterator[Pair]:
    """alice at 11.0.0.1 and bob at 11.0.0.2, in one world, with links of the KINDS."""
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
            yield Pair(world, alice, bob, nursery)
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
