"""Alice and Bob, and Rita who relays for members."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

import trio
import trio.testing

from tests.lab.datagrams import World
from tests.lab.nodes import PATIENCE_S, Node, Pair, echo, identity, reach_through, start_node
from tunnels import PeerId, Session, StreamError
from tunnels.relay import Carries, Relay
from tunnels.relay_caps import MIB


def relay_of(pair: Pair) -> Relay:
    assert pair.rita is not None
    assert pair.rita.endpoint.relaying.relay is not None
    return pair.rita.endpoint.relaying.relay


def strangers_but(members: Collection[str]) -> Callable[[PeerId, str], bool]:
    """Rules of a relay's node by which these alone are members, whoever that is by then."""
    return lambda peer, _service: peer in {identity(name).peer for name in members}


@asynccontextmanager
async def through_rita(
    members: Collection[str], carries: Carries = Carries.TRAFFIC
) -> AsyncIterator[Pair]:
    """alice and bob, of whom bob reserved at rita, where only `members` are known."""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            world = World()
            nursery.start_soon(world.run)
            rita = await start_node(
                nursery,
                world.host("11.0.0.9"),
                "rita",
                authorize=strangers_but(members),
                carries=carries,
            )
            alice = await start_node(
                nursery, world.host("11.0.0.1"), "alice", transports=("relay",)
            )
            # What does not say that it is a relay is reached like anybody else.
            links = ("relay",) if carries is Carries.TRAFFIC else ("relay", "tcp")
            bob = await start_node(nursery, world.host("11.0.0.2"), "bob", transports=links)
            await reach_through(rita, bob)
            bob.endpoint.serve("echo", echo)
            yield Pair(world, alice, bob, nursery, rita)
            nursery.cancel_scope.cancel()


async def takes(session: Session, size_bytes: int = 6 * MIB, within_s: float = math.inf) -> int:
    """How many bytes come back from the echo before it breaks off, or the time is over."""
    stream, taken = await session.open("echo"), 0

    async def send() -> None:
        with contextlib.suppress(StreamError):
            await stream.send_all(bytes(size_bytes))
            await stream.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + within_s
        nursery.start_soon(send)
        with contextlib.suppress(StreamError):
            while piece := await stream.receive_some():
                taken += len(piece)
        nursery.cancel_scope.cancel()
    return taken


async def reach(pair: Pair, node: Node) -> None:
    assert pair.rita is not None
    places = pair.rita.endpoint.candidates()
    session = await node.endpoint.connect(pair.rita.endpoint.peer, places)
    await node.endpoint.relaying.reserve(session, places)
