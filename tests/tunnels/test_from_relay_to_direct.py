"""Whole nodes behind NATs of every kind, a relay and its STUN between them: they begin through the
relay, and what can go direct does so while streams run."""

from __future__ import annotations

import random
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio
import trio.testing

from tests.lab.datagrams import Weather, World
from tests.lab.nats import Internet, Kind, Router
from tests.lab.nodes import (
    PATIENCE_S,
    Node,
    echo,
    exchange,
    reach_through,
    start_node,
    start_relay,
)
from tunnels import Session
from tunnels.peer import NatKind
from tunnels.stun import Server

Clock = trio.testing.MockClock
PORT = 4433
LINKS = ("tcp", "quic", "relay")
NATS = (Kind.FULL_CONE, Kind.HOME, Kind.SYMMETRIC)  # all others: test_punch.py
DIRECT_S = 5.0
NEVER_S = 60.0
MIB = 1 << 20
TRIES = 4


@dataclass
class Pair:
    alice: Node
    bob: Node
    world: World

    async def connect(self) -> Session:
        bob = self.bob.endpoint
        return await self.alice.endpoint.connect(bob.peer, bob.candidates())


@asynccontextmanager
async def behind(
    alices: Kind, bobs: Kind, seed: int = 0, weather: Weather | None = None
) -> AsyncIterator[Pair]:
    """alice and bob, who know what STUN tells them; bob has reserved at the relay."""
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            world = World(weather, seed)
            nursery.start_soon(world.run)
            internet = Internet(world)
            rita = await start_relay(nursery, internet.host("11.255.1.1"), "rita", port=PORT)
            await start_node(nursery, internet.host("11.255.1.2"), "sam", port=PORT)
            servers = [Server("11.255.1.1", PORT), Server("11.255.1.2", PORT)]
            sides = []
            for number, (name, kind) in enumerate({"alice": alices, "bob": bobs}.items(), 1):
                router = Router(f"11.0.{number}.1", kind)
                host = internet.host(f"192.168.{number}.2", behind=internet.network(router))
                sides.append(await start_node(nursery, host, name, transports=LINKS, stun=servers))
                sides[-1].endpoint.serve("echo", echo)
            await reach_through(rita, sides[1])
            for side in sides:
                await side.endpoint.outside.checked.wait()
            yield Pair(sides[0], sides[1], world)
            nursery.cancel_scope.cancel()


async def time_to_direct(session: Session) -> float | None:
    """None: it stays with the relay."""
    began_s = trio.current_time()
    with trio.move_on_after(NEVER_S):
        while session.stats.link_kind == "relay":
            await session.wait_links_changed()
        return trio.current_time() - began_s
    return None


@pytest.mark.parametrize("bobs", NATS)
@pytest.mark.parametrize("alices", NATS)
async def test_every_pair_of_nats(alices: Kind, bobs: Kind, autojump_clock: Clock) -> None:
    async with behind(alices, bobs, weather=Weather(delay_s=0.02)) as pair:
        is_hard = [side.endpoint.nats().v4 is NatKind.HARD for side in (pair.alice, pair.bob)]
        assert is_hard == [alices.is_hard, bobs.is_hard]
        session = await pair.connect()
        took_s = await time_to_direct(session)
        if all(is_hard):
            assert took_s is None
        else:
            assert took_s is not None
            assert took_s < DIRECT_S
        said = bytes(range(256)) * 256
        [back] = [
            one for one in pair.bob.endpoint.sessions() if one.peer == pair.alice.endpoint.peer
        ]
        for one in (session, back):
            assert await exchange(await one.open("echo"), said) == said
        await trio.sleep(30)
        assert session.stats.link_kind == ("relay" if all(is_hard) else "quic"), "and so it stays"


async def test_a_stream_that_began_at_the_relay_goes_on_straight_byte_for_byte(
    autojump_clock: Clock,
) -> None:
    data = random.Random(1).randbytes(MIB)
    async with behind(Kind.SYMMETRIC, Kind.HOME, weather=Weather(delay_s=0.01)) as pair:
        session = await pair.connect()
        stream = await session.open("echo")
        received, seen = bytearray(), set()

        async def send() -> None:
            for start in range(0, len(data), 10_000):
                await stream.send_all(data[start : start + 10_000])
                await trio.sleep(0.05)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            while piece := await stream.receive_some():
                received += piece
                if stream.channel is not None:
                    seen.add(stream.channel.link.kind)
        assert received == data
        assert seen == {"relay", "quic"}


@pytest.mark.parametrize("hard_dials", [True, False])
async def test_guessing_ports_takes_seconds_in_median(
    hard_dials: bool, autojump_clock: Clock
) -> None:
    """With what it takes to swap offers, and the QUIC handshake; some rain."""
    kinds = (Kind.SYMMETRIC, Kind.HOME) if hard_dials else (Kind.HOME, Kind.SYMMETRIC)
    took_s = []
    for seed in range(TRIES):
        weather = Weather(delay_s=0.025, jitter_s=0.01, loss=0.01)
        async with behind(*kinds, seed=seed, weather=weather) as pair:
            took_s.append(await time_to_direct(await pair.connect()))
    direct_s = sorted(one for one in took_s if one is not None)
    assert len(direct_s) >= 0.95 * TRIES
    assert statistics.median(direct_s) < DIRECT_S
