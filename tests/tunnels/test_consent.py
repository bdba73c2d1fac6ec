"""What addresses get from us that somebody has named, before anybody answers there."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.datagrams import Weather, World
from tests.lab.nodes import identity, two_nodes
from tunnels import Candidate, DialFailed, Endpoint
from tunnels.binding import Address
from tunnels.consent import KNOCKING, UNASKED_BYTES, Knocks, with_headers
from tunnels.demux import SharedSocket
from tunnels.dial import GIVE_UP_S, MAX_CANDIDATES
from tunnels.stun import SOFTWARE, Request, Success, encode
from tunnels.stun_port import StunPort

VICTIM = "11.0.0.66"
QUIC_BIT = 0x40


def heard_bytes(world: World, host: str = VICTIM) -> int:
    """Headers counted."""
    return sum(with_headers(to[0], len(data)) for to, data in world.log if to[0] == host)


async def dial(endpoint: Endpoint, *places: Address) -> None:
    with pytest.raises(DialFailed):
        await endpoint.connect(
            identity("mallory").peer, [Candidate("quic", host, port) for host, port in places]
        )


async def test_one_whom_a_peer_names_gets_a_kilobyte_and_no_flood(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        pair.world.record = True
        ports = [(VICTIM, 1000 + n) for n in range(MAX_CANDIDATES)]
        await dial(pair.alice.endpoint, *ports)
        assert 0 < heard_bytes(pair.world) <= UNASKED_BYTES
        began_s = trio.current_time() - GIVE_UP_S
        while trio.current_time() - began_s < 120:
            await dial(pair.alice.endpoint, *ports)
        seconds = trio.current_time() - began_s
        assert heard_bytes(pair.world) <= KNOCKING.burst + KNOCKING.per_s * seconds
        assert (await pair.connect()).stats.link_kind == "quic", "others are dialled as ever"


async def test_a_redial_does_not_flood_either(autojump_clock: trio.testing.MockClock) -> None:
    """A member may tell of new places of its own, and be silent then."""
    async with two_nodes(dead_after_s=120) as pair:
        session = await pair.connect()
        places = [Candidate("quic", VICTIM, 1000 + n) for n in range(16)]
        pair.alice.endpoint.learn(session.peer, places)
        pair.world.record = True
        pair.bob.kill()
        began_s = trio.current_time()
        await session.closed.wait()
        seconds = trio.current_time() - began_s
        assert seconds > 100
        assert 0 < heard_bytes(pair.world) <= KNOCKING.burst + KNOCKING.per_s * seconds


async def test_a_public_server_of_stun_gets_no_quic_for_its_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        server = SharedSocket(pair.world.host(VICTIM).bind(None, 3478))
        server.on_stun = lambda data, sender: server.send(
            [encode(Success(data[8:20], sender, software=b"coturn"))], sender
        )
        pair.nursery.start_soon(server.run)
        pair.world.record = True
        with pytest.raises(DialFailed, match="not a node"):
            await pair.alice.endpoint.connect(
                identity("mallory").peer, [Candidate("quic", VICTIM, 3478)]
            )
        assert not [data for to, data in pair.world.log if to[0] == VICTIM and data[0] & QUIC_BIT]


async def test_where_a_peer_has_answered_nobody_asks_first(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        session.end("for now")
        await trio.sleep(1)
        pair.world.record = True
        for dialler, other in ((pair.alice, pair.bob), (pair.bob, pair.alice)):
            pair.world.log.clear()
            again = await dialler.endpoint.connect(other.endpoint.peer, other.endpoint.candidates())
            first = next(data for to, data in pair.world.log if to[0] == other.host.addresses[0])
            assert first[0] & QUIC_BIT
            again.end("for now")
            await trio.sleep(1)


async def test_a_lost_question_costs_a_first_connection_a_quarter_of_a_second(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with two_nodes(Weather(delay_s=0.02)) as pair:
        pair.world.cut = True
        async with trio.open_nursery() as nursery:
            began_s = trio.current_time()
            nursery.start_soon(pair.connect)
            await trio.sleep(0.03)
            pair.world.cut = False
        assert 0.25 < trio.current_time() - began_s < 0.5


async def test_two_that_knock_at_one_door_are_both_let_in(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.run)
        alice, bob = (SharedSocket(world.host(f"11.0.0.{n}").bind(None, 9)) for n in (1, 2))
        ours = StunPort(alice)
        StunPort(bob)
        for task in (alice.run, bob.run, ours.run):
            nursery.start_soon(task)
        met: list[bool] = []

        async def knock() -> None:
            met.append(await ours.knock(bob.local))

        async with trio.open_nursery() as both:
            both.start_soon(knock)
            both.start_soon(knock)
        assert met == [True, True]
        assert not ours._doors
        nursery.cancel_scope.cancel()


# --- the count ------------------------------------------------------------------------------


def test_all_ports_of_a_host_share_what_is_sent_there_unasked() -> None:
    knocks, size = Knocks(), len(encode(Request(bytes(12), software=SOFTWARE)))
    most = KNOCKING.burst // with_headers(VICTIM, size)
    taken = [knocks.take((VICTIM, port), size, 0.0) for port in range(100)]
    assert sum(taken) == most
    assert knocks.take(("11.0.0.67", 1), size, 0.0), "another host has its own"
    assert not knocks.take((VICTIM, 1), size, 1.0)
    assert knocks.take((VICTIM, 1), size, 60.0), "not for ever"


def test_who_answers_is_not_charged_for_the_question() -> None:
    knocks = Knocks()
    for door in range(100):
        assert knocks.take((VICTIM, door), 36, 0.0)
        knocks.over((VICTIM, door), 0.0, answered=True)
    assert knocks.take((VICTIM, 1), 700, 0.0)
    knocks.over((VICTIM, 1), 0.0, answered=False)
    assert not knocks.take((VICTIM, 2), 700, 0.0)
    knocks.over((VICTIM, 2), 0.0, answered=True)
    assert not knocks.take((VICTIM, 2), 700, 0.0), "an answer pays for its own question only"


def test_headers_count_as_they_are() -> None:
    assert with_headers("11.0.0.1", 36) == 64
    assert with_headers("2001:db8::1", 36) == 84
