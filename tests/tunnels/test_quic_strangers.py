"""Noise, forgeries and strangers at the port where QUIC listens."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from tests.lab.nodes import echo, exchange, two_nodes
from tests.lab.strangers import first_initial
from tests.tunnels.conftest import over_quic
from tunnels.door import MAX_HALF_OPEN_PER_NETWORK, UNCHECKED_HALF_OPEN

pytestmark = pytest.mark.usefixtures("link_kind")


@over_quic
async def test_garbage_leaves_no_trace(autojump_clock: trio.testing.MockClock) -> None:
    dice = random.Random(5)
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        bob = pair.bob.endpoint.candidates()[0]
        transport = pair.bob.endpoint._linking.transports["quic"]
        links_before = len(transport._links)  # type: ignore[attr-defined]
        for _ in range(500):
            noise = bytearray(dice.randbytes(dice.choice([0, 1, 5, 9, 30, 1200, 1400])))
            if noise and dice.random() < 0.5:
                noise[0] |= 0xC0  # looks like an Initial
                noise[1:5] = b"\x00\x00\x00\x01"
                noise[5:6] = b"\x08"
            pair.world.inject(bytes(noise), ("11.6.6.6", 666), (bob.host, bob.port))
        pair.world.record = True
        assert await exchange(await session.open("echo"), b"hello") == b"hello"
        assert len(transport._links) == links_before  # type: ignore[attr-defined]
        assert not [one for one in pair.world.log if one[0][0] == "11.6.6.6"]


@over_quic
async def test_mangled_copies_of_real_datagrams_do_no_harm(
    autojump_clock: trio.testing.MockClock,
) -> None:
    dice = random.Random(6)
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        pair.world.record = True
        session = await pair.connect()
        data = dice.randbytes(200_000)
        assert await exchange(await session.open("echo"), data) == data
        for target, datagram in list(pair.world.log):
            mangled = bytearray(datagram)
            mangled[dice.randrange(len(mangled))] ^= 1 << dice.randrange(8)
            pair.world.inject(bytes(mangled), ("11.6.6.6", 666), target)
        await trio.sleep(5)
        assert await exchange(await session.open("echo"), data) == data
        assert session.stats.remote is not None
        assert session.stats.remote.startswith("11.0.0.2")


@over_quic
async def test_strangers_that_never_prove_themselves_are_few_and_forgotten(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        await pair.connect()
        bob = pair.bob.endpoint.candidates()[0]
        transport = pair.bob.endpoint._linking.transports["quic"]
        for number in range(200):
            stranger = (f"11.7.{number % 100}.1", number)
            pair.world.inject(first_initial(), stranger, (bob.host, bob.port))
        for number in range(30):
            pair.world.inject(first_initial(), ("11.8.0.1", number), (bob.host, bob.port))
        await trio.testing.wait_all_tasks_blocked()
        # alice was the first of those that were taken at their word
        assert transport._door.half_open == UNCHECKED_HALF_OPEN - 1  # type: ignore[attr-defined]
        await trio.sleep(6)
        assert transport._door.half_open == 0  # type: ignore[attr-defined]
        assert len(pair.bob.endpoint.sessions()) == 1


@over_quic
async def test_one_stranger_cannot_take_all_the_room(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        bob = pair.bob.endpoint.candidates()[0]
        transport = pair.bob.endpoint._linking.transports["quic"]
        for number in range(30):
            pair.world.inject(first_initial(), ("11.8.0.1", number), (bob.host, bob.port))
        await trio.testing.wait_all_tasks_blocked()
        assert transport._door.half_open_from("11.8.0.1") == (  # type: ignore[attr-defined]
            MAX_HALF_OPEN_PER_NETWORK
        )
        await pair.connect()


@over_quic
async def test_a_stranger_may_say_little_and_not_for_long(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        transport = pair.alice.endpoint._linking.transports["quic"]
        bob = pair.bob.endpoint
        [place] = bob.candidates()
        loud = await transport.dial(place, bob.peer)
        control, other = await loud.open_channel(), await loud.open_channel()
        control.send(b"\x01")
        other.send(bytes(100_000))
        with trio.fail_after(2):
            await loud.closed.wait()
        assert loud.closure is not None
        assert loud.closure.reason == "too much data before the handshake"
        silent = await transport.dial(place, bob.peer)
        with trio.fail_after(6):
            await silent.closed.wait()
        assert silent.closure is not None
        assert silent.closure.by_peer
        assert bob.sessions() == []
