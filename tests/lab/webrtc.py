"""WebRTC links on loopback, below any session."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import trio

from tests.lab.nodes import identity
from tunnels import Identity
from tunnels.allowance import Budget
from tunnels.credit import INITIAL_WINDOW_BYTES
from tunnels.dial import AddressPolicy
from tunnels.epochs import Epochs
from tunnels.link import Channel, Introduction, Link, ProvenLink, prove
from tunnels.turn import IceServers
from tunnels.webrtc import WebRtcChannel, WebRtcLink
from tunnels.webrtc_transport import OVER_SESSION, Swap, WebRtcTransport

LOOPBACK = "127.0.0.1"
NOISE = bytes(range(256)) * 64  # 16 KiB


@dataclass
class Side:
    """One node's WebRTC, without sessions: links that others begin are taken from `accepted`."""

    identity: Identity
    transport: WebRtcTransport
    accepted: trio.MemoryReceiveChannel[WebRtcLink]
    swap: Swap | None = None

    def answers(self, asker: Identity) -> Swap:
        """How `asker` swaps descriptions with this side, by the shortest way there is."""

        async def swap(offer: bytes) -> bytes:
            return await self.transport.answer_untrusted(asker.peer, offer)

        return swap

    async def dial(self, other: Side) -> WebRtcLink:
        self.swap = self.swap or other.answers(self.identity)
        return await self.transport.dial(OVER_SESSION, other.identity.peer)

    async def prove(self, link: Link, other: Side | None = None) -> ProvenLink:
        us = Introduction(self.identity, Epochs().of, INITIAL_WINDOW_BYTES)
        expect = None if other is None else other.identity.peer
        proven = await prove(link, us, expect=expect, entropy=secrets.token_bytes)
        link.trusted = True
        return proven


@dataclass
class Linked:
    """Two sides with a proven link between them."""

    alice: Side
    bob: Side
    near: WebRtcLink = field(init=False)
    far: WebRtcLink = field(init=False)

    async def link(self) -> None:
        self.near = await self.alice.dial(self.bob)
        self.far = await self.bob.accepted.receive()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.bob.prove, self.far)
            await self.alice.prove(self.near, self.bob)


def side(
    nursery: trio.Nursery,
    name: str,
    servers: IceServers = IceServers(),  # noqa: B008 - frozen
    policy: AddressPolicy = AddressPolicy(allow_loopback=True),  # noqa: B008 - frozen
    host: str = LOOPBACK,
) -> Side:
    give, take = trio.open_memory_channel[WebRtcLink](16)

    async def accept(link: Link) -> None:
        assert isinstance(link, WebRtcLink)
        give.send_nowait(link)
        await link.closed.wait()

    transport = WebRtcTransport(
        nursery,
        accept,
        Budget(trio.current_time()),
        own_hosts=lambda: [host],
        policy=lambda: policy.at("0.0.0.0", [host]),
        swap_with=lambda _peer: made.swap,
        servers=servers,
    )
    made = Side(identity(name), transport, take)
    return made


@asynccontextmanager
async def two_sides(
    servers: IceServers = IceServers(),  # noqa: B008 - frozen
    within_s: float = 30.0,
) -> AsyncIterator[Linked]:
    with trio.fail_after(within_s):
        async with trio.open_nursery() as nursery:
            yield Linked(side(nursery, "alice", servers), side(nursery, "bob", servers))
            nursery.cancel_scope.cancel()


async def on_island(link: WebRtcLink, function: Callable[[], Awaitable[object]]) -> None:
    """Run something where the link's stack lives."""

    async def run() -> None:
        await function()

    await link.stack.island.run(run)


async def pair_of_channels(links: Linked) -> tuple[WebRtcChannel, WebRtcChannel]:
    near = await links.near.open_channel()
    near.send(b"!")
    far = await links.far.accept_channel()
    assert await far.receive() == b"!"
    return near, far


async def read_all(channel: Channel) -> bytes:
    data = bytearray()
    while piece := await channel.receive():
        data += piece
    return bytes(data)
