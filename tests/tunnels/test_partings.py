"""Nodes part, are killed, restart: what the other one is told, and when."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from tests.lab.datagrams import Weather
from tests.lab.nodes import echo, start_node, two_nodes
from tests.tunnels.conftest import over_every_kind
from tunnels import SessionClosed, SessionDown, SessionUp, Stream, StreamLost, TunnelError

pytestmark = pytest.mark.usefixtures("link_kind")


@over_every_kind
async def test_a_goodbye_is_noticed_at_once_with_its_reason(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        events = pair.bob.endpoint.subscribe()
        session = await pair.connect()
        await session.aclose("maintenance")
        assert session.close_reason == "maintenance"
        with pytest.raises(SessionClosed, match="maintenance"):
            await session.open("echo")
        assert isinstance(await events.receive(), SessionUp)
        with trio.fail_after(0.5):
            down = await events.receive()
        assert isinstance(down, SessionDown)
        assert down.reason == "maintenance"
        assert down.peer == pair.alice.endpoint.peer
        assert pair.bob.endpoint.sessions() == []


async def test_what_was_sent_before_closing_arrives_before_the_goodbye(
    autojump_clock: trio.testing.MockClock,
) -> None:
    data = random.Random(7).randbytes(400_000)
    got = bytearray()
    ended = trio.Event()

    async def keep(stream: Stream) -> None:
        while piece := await stream.receive_some():
            got.extend(piece)
        ended.set()

    async with two_nodes(Weather(delay_s=0.03)) as pair:
        pair.bob.endpoint.serve("keep", keep)
        session = await pair.connect()
        stream = await session.open("keep")
        await stream.send_all(data)
        await stream.aclose()
        await session.aclose("that was all")
        with trio.fail_after(1):
            await ended.wait()
        assert got == data


async def test_connecting_to_a_silent_peer_finds_its_new_process(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        old = await pair.connect()
        pair.bob.kill()
        await trio.sleep(5)
        assert old.suspected
        bob = await start_node(pair.nursery, pair.world.host("11.0.0.3"), "bob")
        alice = pair.alice.endpoint
        new = await alice.connect(bob.endpoint.peer, bob.endpoint.candidates())
        assert new is not old
        assert old.close_reason == "the peer has restarted"
        assert alice.sessions() == [new]


async def test_subscribers_hear_the_end_of_the_endpoint(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        events = pair.bob.endpoint.subscribe()
        await pair.connect()
        pair.bob.stop()
        kinds = [type(event) async for event in events]
        assert kinds == [SessionUp, SessionDown]


async def test_a_node_that_stops_says_so(autojump_clock: trio.testing.MockClock) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        await trio.sleep(1)
        pair.bob.stop()
        with trio.fail_after(0.5):
            await session.closed.wait()
        assert session.close_reason == "the node is stopping"
        with pytest.raises(StreamLost, match="the node is stopping"):
            await stream.receive_some()


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.015, 0.025, 0.045])
async def test_a_node_that_stops_in_the_middle_of_a_dial_says_so(
    autojump_clock: trio.testing.MockClock, after_s: float
) -> None:
    async with two_nodes() as pair, trio.open_nursery() as nursery:

        async def connect() -> None:
            with pytest.raises(TunnelError):
                await pair.connect()

        nursery.start_soon(connect)
        await trio.sleep(after_s)
        pair.alice.stop()


async def test_a_killed_peer_is_suspected_after_3_s_and_given_up_after_10(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        await trio.sleep(2)
        pair.bob.kill()
        began_s = trio.current_time()
        await trio.sleep(4.5)
        assert session.suspected
        assert not session.closed.is_set()
        with pytest.raises(StreamLost, match=r"no answer for 1[01] s"):
            await stream.receive_some()
        assert 9 <= trio.current_time() - began_s <= 12
        assert pair.alice.endpoint.sessions() == []


async def test_a_restarted_peer_fails_the_old_streams_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        alice = pair.alice.endpoint
        events = alice.subscribe()
        pair.bob.endpoint.serve("echo", echo)
        old = await pair.connect()
        stream = await old.open("echo")
        await trio.sleep(1)
        pair.bob.kill()
        host = pair.world.host("11.0.0.3")
        bob = await start_node(pair.nursery, host, "bob")
        began_s = trio.current_time()
        await bob.endpoint.connect(alice.peer, alice.candidates())
        with pytest.raises(StreamLost, match="restarted"):
            await stream.receive_some()
        assert trio.current_time() - began_s < 1
        kinds = [type(await events.receive()) for _ in range(3)]
        assert kinds == [SessionUp, SessionDown, SessionUp]
        assert alice.session(bob.endpoint.peer) is not old
