"""Two nodes meet: whom a dial finds, over which way, and what is said where it finds nobody."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from tests.lab.datagrams import Weather, World
from tests.lab.nodes import Pair, echo, exchange, identity, start_node, two_nodes
from tunnels import (
    AddressPolicy,
    Candidate,
    DialFailed,
    Endpoint,
    ListenFailed,
    Session,
    SessionUp,
    TunnelError,
    WrongPeer,
)
from tunnels.quic_channels import UNSENT_BYTES

STRANGER = identity("stranger").peer
pytestmark = pytest.mark.usefixtures("link_kind")


async def test_peers_dialled_in_vain_leave_nothing_behind(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        dialler = pair.alice.endpoint

        async def dial(name: str) -> None:
            with pytest.raises(TunnelError):
                await dialler.connect(identity(name).peer, [Candidate("quic", "11.0.0.2", 9)])

        async with trio.open_nursery() as nursery:
            for name in ("carol", "carol", "dave"):
                nursery.start_soon(dial, name)
        await pair.connect()
        assert not dialler._dialling


async def test_connecting_twice_gives_the_same_session(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        events = pair.bob.endpoint.subscribe()
        session = await pair.connect()
        assert await pair.connect() is session
        assert pair.alice.endpoint.session(pair.bob.endpoint.peer) is session
        assert pair.alice.endpoint.sessions() == [session]
        up = await events.receive()
        assert isinstance(up, SessionUp)
        assert up.peer == pair.alice.endpoint.peer
        assert session.stats.link_kind == link_kind
        await trio.sleep(3)
        assert session.rtt_s == pytest.approx(0.02, abs=0.005)


async def test_places_that_others_know_of_follow_our_own_each_once(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        bob = pair.bob.endpoint
        [own] = bob.candidates()
        far = Candidate(link_kind, "198.18.7.7", 4242, "mapped")
        known = [Candidate(link_kind, own.host, own.port, "reflexive"), far]
        bob.add_candidates(lambda: known)
        bob.add_candidates(lambda: [far, Candidate("pigeon", "198.18.7.7", 4242, "mapped")])
        assert bob.candidates() == [own, far]
        known.clear()
        assert bob.candidates() == [own, far]
        assert bob.bound_ports() == {link_kind: own.port}


async def test_nobody_at_the_address_is_reported_within_8_s(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        began_s = trio.current_time()
        places = [Candidate(link_kind, "11.0.0.77", 4000), Candidate(link_kind, "11.0.0.78", 4000)]
        with pytest.raises(DialFailed) as failure:
            await pair.alice.endpoint.connect(STRANGER, places)
        assert trio.current_time() - began_s <= 8
        assert "11.0.0.77:4000: nobody answered" in str(failure.value)
        assert "11.0.0.78:4000: nobody answered" in str(failure.value)
        assert [place for place, _ in failure.value.failures] == places


async def test_a_wrong_key_at_the_address_is_named_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        began_s = trio.current_time()
        with pytest.raises(DialFailed, match="wrong key") as failure:
            await pair.alice.endpoint.connect(STRANGER, pair.bob.endpoint.candidates())
        assert trio.current_time() - began_s < 1
        assert pair.bob.endpoint.peer.short in str(failure.value)
        await trio.sleep(6)
        assert pair.bob.endpoint.sessions() == []


async def test_the_certificate_is_pinned_before_a_word_is_said(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        transport = pair.alice.endpoint._linking.transports[link_kind]
        [place] = pair.bob.endpoint.candidates()
        with pytest.raises(WrongPeer):
            await transport.dial(place, STRANGER)


async def test_a_channel_holds_its_writer_while_the_network_is_away(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes(dead_after_s=60) as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        channel = stream.channel
        assert channel is not None
        pair.world.cut = True
        with trio.move_on_after(10) as patience:
            await stream.send_all(bytes(4 * UNSENT_BYTES - 1))  # within the reader's window
        assert patience.cancelled_caught
        pair.world.cut = False
        with trio.fail_after(10):
            await channel.wait_writable()


async def test_a_refused_port_and_a_foreign_transport_are_named(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        pair.world.refusing.add(("11.0.0.9", 9))
        places = [Candidate(link_kind, "11.0.0.9", 9), Candidate("pigeon", "11.0.0.9", 9)]
        began_s = trio.current_time()
        with pytest.raises(DialFailed) as failure:
            await pair.alice.endpoint.connect(STRANGER, places)
        assert trio.current_time() - began_s < 1
        assert "no node listens on that port" in str(failure.value)
        assert f"links over {link_kind} only" in str(failure.value)


async def test_no_address_and_our_own_id_are_sentences(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        alice = pair.alice.endpoint
        with pytest.raises(DialFailed, match="no address is known"):
            await alice.connect(STRANGER, [])
        with pytest.raises(TunnelError, match="own id"):
            await alice.connect(alice.peer, alice.candidates())


async def test_the_first_address_that_answers_wins(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        bob = pair.bob.endpoint
        dead = [Candidate(link_kind, f"11.0.1.{number}", 4000) for number in range(3)]
        began_s = trio.current_time()
        session = await pair.alice.endpoint.connect(bob.peer, [*dead, *bob.candidates()])
        assert trio.current_time() - began_s < 1.5
        assert session.stats.remote is not None
        assert session.stats.remote.startswith("11.0.0.2:")


async def test_a_forbidden_address_is_not_contacted(
    autojump_clock: trio.testing.MockClock, link_kind: str
) -> None:
    async with two_nodes() as pair:
        sent = pair.world.sent
        with pytest.raises(DialFailed, match="loopback"):
            await pair.alice.endpoint.connect(STRANGER, [Candidate(link_kind, "127.0.0.1", 53)])
        assert pair.world.sent == sent


async def test_both_dial_at_once_and_meet_in_one_session(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes(Weather(delay_s=0.03)) as pair:
        alice, bob = pair.alice.endpoint, pair.bob.endpoint
        alice.serve("echo", echo)
        bob.serve("echo", echo)
        data = random.Random(3).randbytes(300_000)

        async def dial(one: Endpoint, other: Endpoint) -> None:
            session = await one.connect(other.peer, other.candidates())
            async with await session.open("echo") as stream:
                assert await exchange(stream, data) == data

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dial, alice, bob)
            nursery.start_soon(dial, bob, alice)
        await trio.sleep(5)
        ours, theirs = alice.session(bob.peer), bob.session(alice.peer)
        assert ours is not None
        assert theirs is not None
        assert len(alice.sessions()) == len(bob.sessions()) == 1
        assert ours.best_link is not None
        assert theirs.best_link is not None
        assert ours.best_link.role is theirs.best_link.role.other


async def test_a_stream_moves_to_another_link_when_its_own_dies(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes(Weather(delay_s=0.02, loss=0.02)) as pair:
        pair.bob.endpoint.serve("echo", echo)
        session = await two_links(pair)
        stream = await session.open("echo")
        data = random.Random(4).randbytes(3 << 20)

        async def kill_the_link() -> None:
            await trio.sleep(0.4)
            link = session.best_link
            assert link is not None
            link.close(3, "cut by the test")  # type: ignore[arg-type]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_the_link)
            assert await exchange(stream, data) == data
        assert len(session._links) == 1
        await trio.sleep(1)
        assert not session._streams


async def two_links(pair: Pair) -> Session:
    """A session over two links: both sides dialled at the same moment."""
    alice, bob = pair.alice.endpoint, pair.bob.endpoint
    async with trio.open_nursery() as nursery:
        nursery.start_soon(alice.connect, bob.peer, bob.candidates())
        nursery.start_soon(bob.connect, alice.peer, alice.candidates())
    await trio.sleep(1)
    session = alice.session(bob.peer)
    assert session is not None
    assert len(session._links) == 2
    return session


async def test_a_port_in_use_is_a_sentence() -> None:
    host = World().host("11.0.0.1")
    host.bind(None, 4000)
    endpoint = Endpoint(identity("alice"), authorize=lambda *_: True, network=host)
    with pytest.raises(ListenFailed, match="port is in use"):
        await endpoint.run(None, 4000)


async def test_private_addresses_need_a_private_network_or_leave(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with trio.open_nursery() as nursery:
        world = World()
        nursery.start_soon(world.run)
        public = await start_node(nursery, world.host("11.0.0.1"), "alice")
        bob = await start_node(nursery, world.host("10.0.0.2"), "bob")
        place, peer = bob.endpoint.candidates(), bob.endpoint.peer
        with pytest.raises(DialFailed, match="private"):
            await public.endpoint.connect(peer, place)
        allowed = await start_node(
            nursery,
            world.host("11.0.0.3"),
            "carol",
            policy=AddressPolicy(allow_private=True),
        )
        assert await allowed.endpoint.connect(peer, place)
        neighbour = await start_node(nursery, world.host("10.9.9.9"), "dave")
        assert await neighbour.endpoint.connect(peer, place)
        nursery.cancel_scope.cancel()
