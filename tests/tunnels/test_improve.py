"""A session starts on the first link that works and moves, streams and all, to a better one."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import cast

import pytest
import trio
import trio.testing

from tests.lab.datagrams import Weather, World
from tests.lab.nodes import PATIENCE_S, Pair, echo, exchange, identity, start_node
from tunnels import Candidate, LinkClosed, PeerId, Session
from tunnels.dial import rank_of, ranked
from tunnels.exchange import Exchange, Ourselves, Swap
from tunnels.handshake import Role
from tunnels.improve import LAST_PAUSE_S, Improver
from tunnels.link import LINK_KINDS, CloseCode, ProvenLink
from tunnels.offers import MAX_CANDIDATES, Offer, Want

MIB = 1 << 20
LAN = "11.0.0."


@asynccontextmanager
async def on_one_lan(near: str | None = LAN) -> AsyncIterator[Pair]:
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            world = World(Weather(delay_s=0.005))
            nursery.start_soon(world.run)
            hosts = [world.host(f"11.0.0.{number}") for number in (1, 2)]
            for host in hosts:
                host.near = near
            alice = await start_node(nursery, hosts[0], "alice", dead_after_s=30)
            bob = await start_node(nursery, hosts[1], "bob", dead_after_s=30)
            for node in (alice, bob):
                node.endpoint.serve("echo", echo)
            yield Pair(world, alice, bob, nursery)
            nursery.cancel_scope.cancel()


@dataclass(eq=False)
class Relayed:
    """What the improver sees of a session whose only link leads through a relay."""

    peer: PeerId
    rank: int = LINK_KINDS["relay"].rank
    rtt_s: float = 0.01
    suspected: bool = False
    closed: trio.Event = field(default_factory=trio.Event)
    wait_links_changed = staticmethod(trio.sleep_forever)


def place(kind: str, host: str) -> Candidate:
    return Candidate(kind, host, 1)


def is_near(host: str) -> bool:
    return host.startswith("192.168.")


def kinds(session: Session) -> list[str]:
    return sorted(proven.link.kind for proven in session._links)


async def test_on_a_lan_tcp_is_first(autojump_clock: trio.testing.MockClock) -> None:
    async with on_one_lan() as pair:
        session = await pair.connect()
        assert session.stats.link_kind == "tcp"
        await trio.sleep(100)
        assert kinds(session) == ["tcp"], "there is nothing better to look for"


async def test_far_away_quic_is_first(autojump_clock: trio.testing.MockClock) -> None:
    async with on_one_lan(near=None) as pair:
        session = await pair.connect()
        assert session.stats.link_kind == "quic"
        await trio.sleep(100)
        assert kinds(session) == ["quic"]


async def test_where_udp_is_blocked_tcp_will_do(autojump_clock: trio.testing.MockClock) -> None:
    async with on_one_lan(near=None) as pair:
        [tcp, quic] = pair.bob.endpoint.candidates()
        unheard = Candidate("quic", quic.host, 9)
        session = await pair.alice.endpoint.connect(pair.bob.endpoint.peer, [unheard, tcp])
        assert session.stats.link_kind == "tcp"


async def test_a_blocked_tcp_port_delays_the_session_by_a_stagger_only(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with on_one_lan() as pair:
        pair.world.tcp_blocked = True
        began_s = trio.current_time()
        session = await pair.connect()
        assert trio.current_time() - began_s < 0.5
        assert session.stats.link_kind == "quic"


@pytest.mark.parametrize("opener", ["alice", "bob"])
async def test_a_live_stream_moves_to_the_better_link_without_a_byte_lost(
    opener: str, autojump_clock: trio.testing.MockClock
) -> None:
    data = random.Random(1).randbytes(3 * MIB)
    async with on_one_lan() as pair:
        pair.world.tcp_blocked = True
        session = await pair.connect()
        assert session.stats.link_kind == "quic"
        [bobs] = pair.bob.endpoint.sessions()
        mine = session if opener == "alice" else bobs
        stream = await mine.open("echo")
        received = bytearray()

        async def send() -> None:
            for start in range(0, len(data), 10_000):
                await stream.send_all(data[start : start + 10_000])
                await trio.sleep(0.05)
            await stream.send_eof()

        async def free_the_port() -> None:
            await trio.sleep(4)
            pair.world.tcp_blocked = False

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            nursery.start_soon(free_the_port)
            seen = set()
            while piece := await stream.receive_some():
                received += piece
                assert stream.channel is not None
                seen.add(stream.channel.link.kind)
        assert received == data
        assert seen == {"quic", "tcp"}
        assert kinds(session) == ["quic", "tcp"], "the other is kept for bad days"
        await trio.sleep(5)
        assert not session._streams
        assert not bobs._streams


async def test_when_the_better_link_dies_streams_go_on_at_once_and_come_back_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with on_one_lan() as pair:
        pair.world.tcp_blocked = True
        session = await pair.connect()
        pair.world.tcp_blocked = False
        await trio.sleep(20)
        assert session.stats.link_kind == "tcp"
        stream = await session.open("echo")
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
        for _ in range(8):
            best = session.best_link
            assert best is not None
            assert best.kind == "tcp"
            best.close(CloseCode.LINK_OVER, "cut by the test")
            await trio.sleep(0.2)
            assert session.stats.link_kind == "quic"
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await trio.sleep(5)
        await stream.send_eof()
        assert await stream.receive_some() == b""


async def test_a_better_link_that_opens_no_channel_takes_no_stream(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its control connection came through, and then the firewall changed its mind."""
    async with on_one_lan() as pair:
        pair.world.tcp_blocked = True
        session = await pair.connect()
        stream = await session.open("echo")
        pair.world.tcp_blocked = False
        connect = pair.alice.host.connect
        calls = 0

        async def only_the_first(to: tuple[str, int]) -> object:
            nonlocal calls
            calls += 1
            pair.world.tcp_blocked = calls > 1
            return await connect(to)

        pair.alice.host.connect = only_the_first  # type: ignore[method-assign,assignment]
        data = bytes(MIB)
        await trio.sleep(10)
        assert calls > 1
        assert await exchange(stream, data) == data
        assert session.stats.link_kind == "quic"


async def test_a_peer_s_offers_take_the_place_of_its_last_ones(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A relayed peer that offers other addresses at each swap fills nothing and holds up nobody."""
    session, swaps = cast(Session, Relayed(identity("bob").peer)), count(1)

    class Offers(Exchange):
        async def ask(self, session: Session, want: Want) -> Swap:
            net = next(swaps)
            places = tuple(Candidate("tcp", f"11.{net}.0.{n}", 9) for n in range(MAX_CANDIDATES))
            mine, theirs = (Offer(b"", b"", candidates=offered) for offered in ((), places))
            return Swap(session.peer, Role.DIALLER, mine, theirs, b"")

    async def nobody(_peer: PeerId, place: Candidate) -> ProvenLink:
        dialled.append(place.host)
        raise LinkClosed("nobody is there")

    dialled: list[str] = []
    improver = Improver(is_near, nobody, lambda _: session, lambda _: session, {"tcp"})
    improver.exchange = Offers(lambda: Ourselves(()), improver.follow)
    async with trio.open_nursery() as nursery:
        improver.look_after(session, [place("tcp", "11.0.0.2")], nursery)
        await trio.sleep(10 * LAST_PAUSE_S)
        dialled.clear()
        await trio.sleep(LAST_PAUSE_S + 1)
        nursery.cancel_scope.cancel()
    last = next(swaps) - 1
    nets = {host.rpartition(".")[0] for host in dialled}
    assert nets == {"11.0.0", f"11.{last - 1}.0", f"11.{last}.0"}


# --- the order -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "tried"),
    [
        (
            [place("quic", "192.168.1.1"), place("tcp", "192.168.1.1")],
            [place("tcp", "192.168.1.1"), place("quic", "192.168.1.1")],
        ),
        (
            [place("tcp", "11.0.0.1"), place("quic", "11.0.0.1")],
            [place("quic", "11.0.0.1"), place("tcp", "11.0.0.1")],
        ),
        (
            [place("tcp", "11.0.0.1"), place("tcp", "192.168.1.1"), place("quic", "192.168.1.1")],
            [place("tcp", "192.168.1.1"), place("quic", "192.168.1.1"), place("tcp", "11.0.0.1")],
        ),
        (
            [place("pigeon", "192.168.1.1"), place("quic", "192.168.1.1")],
            [place("quic", "192.168.1.1"), place("pigeon", "192.168.1.1")],
        ),
    ],
)
def test_candidates_are_tried_in_order_of_preference(
    given: Sequence[Candidate], tried: Sequence[Candidate]
) -> None:
    assert ranked(given, is_near) == tried


def test_the_preference_of_the_design() -> None:
    order = [
        rank_of(place("tcp", "192.168.1.1"), near=True),
        rank_of(place("quic", "11.0.0.1"), near=False),
        rank_of(place("tcp", "11.0.0.1"), near=False),
        rank_of(place("pigeon", "11.0.0.1"), near=False),
    ]
    assert order == sorted(set(order))
    assert all(kind.name == name for name, kind in LINK_KINDS.items())


def test_the_port_that_a_hard_nat_showed_somebody_else_is_not_dialled() -> None:
    there, elsewhere = Candidate("quic", "192.0.2.1", 9), Candidate("quic", "192.0.2.2", 7, "hard")
    assert ranked([elsewhere, there], lambda _host: False) == [there]
