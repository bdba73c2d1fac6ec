"""Datagrams of a QUIC link grow to what the path carries, and shrink when it carries less."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from tests.lab.datagrams import Weather, World
from tests.lab.nodes import echo, exchange, two_nodes
from tests.tunnels.conftest import over_quic
from tunnels.peer import format_address
from tunnels.pmtu import BASE_BYTES, LARGEST_V4_BYTES, NARROW_BYTES
from tunnels.quic import QuicLink
from tunnels.quic_size import SAME_MACHINE_DATAGRAM_BYTES, DatagramSize
from tunnels.session import Session

pytestmark = [over_quic, pytest.mark.usefixtures("link_kind")]
Clock = trio.testing.MockClock


def size_of(session: Session) -> int:
    link = session.best_link
    assert isinstance(link, QuicLink)
    return link.quic._max_datagram_size


def narrow(world: World, carries: int) -> None:
    world.weather = replace(world.weather, carries=carries)


@pytest.mark.parametrize("carries", [1500, LARGEST_V4_BYTES, 1452, 1400, 1280, BASE_BYTES])
async def test_what_a_path_carries_is_found_and_used(autojump_clock: Clock, carries: int) -> None:
    async with two_nodes(Weather(carries=carries)) as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        await trio.sleep(10)
        wanted = min(carries, LARGEST_V4_BYTES)
        assert wanted - NARROW_BYTES < size_of(session) <= wanted
        pair.world.lost = 0
        data = bytes(range(256)) * 1000
        assert await exchange(await session.open("echo"), data) == data
        assert pair.world.lost == 0
        assert session.stats.link_kind == "quic"


async def test_a_transfer_goes_on_when_the_path_becomes_a_black_hole(
    autojump_clock: Clock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        await trio.sleep(5)
        assert size_of(session) == LARGEST_V4_BYTES
        stream = await session.open("echo")
        data = bytes(range(256)) * 4000
        async with trio.open_nursery() as nursery:

            async def shrink() -> None:
                await trio.sleep(0.05)
                narrow(pair.world, 1300)

            nursery.start_soon(shrink)
            began_s = trio.current_time()
            assert await exchange(stream, data) == data
        assert trio.current_time() - began_s < 8  # no link had to be given up
        assert session.best_link is not None
        await trio.sleep(10)
        assert 1300 - NARROW_BYTES < size_of(session) <= 1300


async def test_questions_with_short_ends_fall_back_too(autojump_clock: Clock) -> None:
    """The last packet of each is small and arrives: there are no timeouts to tell."""
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        await trio.sleep(5)
        stream = await session.open("echo")
        narrow(pair.world, 1250)
        began_s = trio.current_time()
        for _ in range(5):
            await stream.send_all(bytes(10_000))
            left = 10_000
            while left:
                left -= len(await stream.receive_some())
        assert trio.current_time() - began_s < 8
        assert size_of(session) <= 1250


async def test_a_full_network_is_no_black_hole(autojump_clock: Clock) -> None:
    async with two_nodes(Weather(loss=0.05)) as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        await trio.sleep(20)
        assert size_of(session) == LARGEST_V4_BYTES
        data = bytes(range(256)) * 2000
        assert await exchange(await session.open("echo"), data) == data
        await trio.sleep(20)
        assert size_of(session) == LARGEST_V4_BYTES


async def test_another_path_begins_with_what_every_path_carries(autojump_clock: Clock) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        link = session.best_link
        assert isinstance(link, QuicLink)
        now = trio.current_time()
        size = DatagramSize(link.quic, ("11.0.0.1", 1), {"11.0.0.1"}.__contains__, now)
        assert size_of(session) == SAME_MACHINE_DATAGRAM_BYTES
        assert size.update(now) is None
        size.follow(("2001:db8::1", 1), now)
        assert size_of(session) == BASE_BYTES
        probe = size.update(now)
        assert probe is not None
        assert len(probe) == 1452
        assert format_address(*link.address)
