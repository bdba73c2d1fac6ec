"""Two nodes that cannot reach each other, joined by a third that cannot read what they say."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
import trio.testing

from tests.lab import nodes
from tests.lab.datagrams import World
from tests.lab.nodes import (
    PATIENCE_S,
    Node,
    Pair,
    echo,
    exchange,
    identity,
    reach_through,
    start_node,
    start_relay,
    two_nodes,
)
from tunnels import (
    Candidate,
    DialFailed,
    PeerId,
    Session,
    Stream,
    StreamError,
    StreamReset,
    TunnelError,
)
from tunnels.redial import GONE_BY_RELAYS_AFTER_S
from tunnels.relay import JOINING, RELAY, RELAYED, RESERVE, Carries, Relay
from tunnels.relay_caps import CAPS, KIB, MIB, Carriage, Standing

SECRET = b"the bank's number is 4711; "


@pytest.fixture(autouse=True)
def _over_a_relay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "KINDS", ("relay",))


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    return autojump_clock


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


# --- two that reach a relay reach each other ------------------------------------------------


async def test_streams_go_both_ways_byte_for_byte(clock: object) -> None:
    async with two_nodes() as pair:
        for node in (pair.alice, pair.bob):
            node.endpoint.serve("echo", echo)
        session = await pair.connect()
        [back] = pair.guests()
        assert session.stats.link_kind == back.stats.link_kind == "relay"
        assert (session.stats.remote or "").startswith(identity("rita").peer.short)
        for one in (session, back):
            said = bytes(range(256)) * 4096
            assert await exchange(await one.open("echo"), said) == said
        await session.aclose()
        await trio.sleep(2)
        assert relay_of(pair).streams == 0, "nothing is left at the relay"


async def test_a_relay_is_named_in_what_its_members_list(clock: object) -> None:
    async with two_nodes() as pair:
        assert pair.rita is not None
        rita = pair.rita.endpoint
        [way] = pair.bob.endpoint.candidates()
        assert (way.transport, way.host, way.via) == ("relay", "11.0.0.9", rita.peer)
        assert str(way) == f"relay 11.0.0.9:{way.port} ({rita.peer.short})"
        [mark, *_] = rita.candidates()
        assert (mark.transport, mark.via) == ("relay", rita.peer), "it says so of itself"
        pair.rita.stop()
        await trio.sleep(1)
        assert pair.bob.endpoint.candidates() == []


async def test_a_relay_in_a_cloud_lists_its_tcp_ports_where_it_is_seen_from_outside(
    clock: object,
) -> None:
    async with two_nodes() as pair:
        assert pair.rita is not None
        rita = pair.rita.endpoint
        seen = Candidate("quic", "203.0.113.5", 7001, "reflexive")
        rita.add_candidates(lambda: [seen])
        tcp = rita.bound_ports()["tcp"]
        assert Candidate("tcp", "203.0.113.5", tcp, "reflexive") in rita.candidates()
        pair.bob.endpoint.add_candidates(lambda: [seen])
        assert [one.transport for one in pair.bob.endpoint.candidates()] == ["relay"]


async def test_nothing_of_what_is_said_can_be_read_at_the_relay(
    monkeypatch: pytest.MonkeyPatch, clock: object
) -> None:
    seen: list[bytes] = []
    copy = Relay._copy

    async def overhear(relay: Relay, source: Stream, sink: Stream, carriage: Carriage) -> None:
        receive = source.receive_some

        async def receive_some(max_bytes: int | None = None) -> bytes:
            seen.append(await receive(max_bytes))
            return seen[-1]

        source.receive_some = receive_some  # type: ignore[method-assign]
        await copy(relay, source, sink, carriage)

    monkeypatch.setattr(Relay, "_copy", overhear)
    async with two_nodes() as pair:
        pair.bob.endpoint.serve("echo", echo)
        said = SECRET * 10_000
        assert await exchange(await (await pair.connect()).open("echo"), said) == said
    heard = b"".join(seen)
    assert len(heard) > 2 * len(said), "both directions went through"
    assert SECRET[:8] not in heard
    assert b"echo" not in heard


async def test_a_direct_way_is_taken_where_there_is_one_and_a_relay_otherwise(
    clock: object,
) -> None:
    async with through_rita({"bob"}) as pair:
        # As in `auto`: the relay's way and a direct one.
        carol = await start_node(pair.nursery, pair.world.host("11.0.0.3"), "carol")
        dave = await start_node(pair.nursery, pair.world.host("11.0.0.4"), "dave")
        direct = dave.endpoint.candidates()
        wrong = [replace(one, host="11.0.0.77") for one in direct]
        through = [replace(one, transport="relay", via=identity("rita").peer) for one in direct]
        session = await carol.endpoint.connect(dave.endpoint.peer, [*through, *direct])
        assert session.stats.link_kind == "quic"
        began_s = trio.current_time()
        places = [*wrong, *pair.bob.endpoint.candidates()]
        session = await carol.endpoint.connect(pair.bob.endpoint.peer, places)
        assert session.stats.link_kind == "relay"
        assert trio.current_time() - began_s < 1.5


async def test_addresses_where_nobody_answers_do_not_hold_up_the_search_for_a_direct_way(
    clock: object,
) -> None:
    async with through_rita({"bob", "dave"}) as pair:
        carol = await start_node(pair.nursery, pair.world.host("11.0.0.3"), "carol")
        dave = await start_node(pair.nursery, pair.world.host("11.0.0.4"), "dave")
        assert pair.rita is not None
        await reach_through(pair.rita, dave)
        through = [one for one in dave.endpoint.candidates() if one.via is not None]
        nobody = Candidate("quic", "11.0.0.77", 4433)
        began_s = trio.current_time()
        session = await carol.endpoint.connect(dave.endpoint.peer, [nobody, *through])
        while session.stats.link_kind == "relay":
            await session.wait_links_changed()
        assert trio.current_time() - began_s < 3.0


async def test_of_a_relays_addresses_one_that_answers_is_enough(clock: object) -> None:
    async with through_rita({"bob"}) as pair:
        [way] = pair.bob.endpoint.candidates()
        dead = [replace(way, host=f"11.0.0.{number}") for number in range(60, 63)]
        session = await pair.alice.endpoint.connect(pair.bob.endpoint.peer, [*dead, way])
        assert session.stats.link_kind == "relay"


async def test_where_udp_is_blocked_the_way_to_the_relay_is_tcp(clock: object) -> None:
    async with through_rita({"bob"}) as pair:
        assert pair.rita is not None
        relay = pair.rita.endpoint
        tcp = relay.bound_ports()["tcp"]
        way = Candidate("relay", "11.0.0.9", tcp, via=relay.peer)
        pair.world.without_udp = {"11.0.0.1"}
        session = await pair.alice.endpoint.connect(pair.bob.endpoint.peer, [way])
        assert await exchange(await session.open("echo"), b"hello") == b"hello"
        leg = pair.alice.endpoint.session(relay.peer)
        assert leg is not None
        assert leg.stats.link_kind == "tcp"


async def test_where_only_port_443_leaves_a_relay_that_listens_there_will_do(
    clock: object,
) -> None:
    async with through_rita({"bob"}) as pair:
        sam = await start_relay(pair.nursery, pair.world.host("11.0.0.8"), "sam", tcp_port=443)
        await reach_through(sam, pair.bob)
        ways = [one for one in pair.bob.endpoint.candidates() if one.via == sam.endpoint.peer]
        assert sorted(way.port for way in ways) == [443, sam.endpoint.bound_ports()["tcp"]]
        pair.world.without_udp = {"11.0.0.1"}
        [other] = [way for way in ways if way.port != 443]
        dead = replace(other, port=9)  # as behind a firewall that drops what goes elsewhere
        leaves = [way for way in ways if way.port == 443]
        session = await pair.alice.endpoint.connect(pair.bob.endpoint.peer, [dead, *leaves])
        assert await exchange(await session.open("echo"), b"hello") == b"hello"
        leg = pair.alice.endpoint.session(sam.endpoint.peer)
        assert leg is not None
        assert leg.stats.remote == "11.0.0.8:443"


# --- who may ---------------------------------------------------------------------------------


async def test_only_members_reserve(clock: object) -> None:
    async with through_rita({"bob"}) as pair:
        with pytest.raises(StreamError, match="not offered"):
            await reach(pair, pair.alice)
        assert pair.alice.endpoint.candidates() == []
        assert relay_of(pair).reservations() == {identity("bob").peer}


async def reach(pair: Pair, node: Node) -> None:
    assert pair.rita is not None
    places = pair.rita.endpoint.candidates()
    session = await node.endpoint.connect(pair.rita.endpoint.peer, places)
    await node.endpoint.relaying.reserve(session, places)


async def test_nobody_is_reached_who_did_not_ask_for_it(clock: object) -> None:
    async with through_rita({"alice", "bob", "carol"}) as pair:
        assert pair.rita is not None
        carol = await start_node(pair.nursery, pair.world.host("11.0.0.3"), "carol")
        await carol.endpoint.connect(identity("rita").peer, pair.rita.endpoint.candidates())
        [way] = pair.bob.endpoint.candidates()
        with pytest.raises(DialFailed, match="did not ask to be reached"):
            await pair.alice.endpoint.connect(carol.endpoint.peer, [way])


async def test_a_relay_joins_nobody_to_a_node_that_reserved_nowhere(clock: object) -> None:
    async with two_nodes() as pair:
        assert pair.rita is not None
        carol = await start_node(pair.nursery, pair.world.host("11.0.0.3"), "carol")
        await carol.endpoint.connect(identity("rita").peer, pair.rita.endpoint.candidates())
        session = pair.rita.endpoint.session(carol.endpoint.peer)
        assert session is not None
        stream = await session.open(f"{RELAYED}{identity('alice').peer}")
        with pytest.raises(StreamReset, match="did not ask to be reached"):
            await stream.receive_some()


async def test_a_stranger_gets_in_with_little_and_has_a_members_caps_once_it_is_one(
    clock: object,
) -> None:
    members = {"bob"}
    async with through_rita(members) as pair:
        assert pair.rita is not None
        session = await pair.connect()
        assert await exchange(await session.open("echo"), b"hello") == b"hello"
        assert await takes(session) < 4 * MIB
        members.add("alice")
        session = await pair.connect()
        assert await takes(session, 5 * MIB) == 5 * MIB


async def test_a_node_that_is_no_relay_carries_introductions_only(clock: object) -> None:
    async with through_rita({"alice", "bob"}, carries=Carries.INTRODUCTIONS) as pair:
        assert pair.rita is not None
        assert all(one.via is None for one in pair.rita.endpoint.candidates())
        [held] = pair.bob.endpoint.relaying.reservations()
        assert held.carries is Carries.INTRODUCTIONS
        session = await pair.connect()
        assert await exchange(await session.open("echo"), bytes(64 * KIB)) == bytes(64 * KIB)
        assert await takes(session, within_s=30) < 2 * MIB, (
            "a new link each ten seconds, capped again"
        )


async def test_a_peer_that_asks_for_too_many_streams_is_told_so(clock: object) -> None:
    async with through_rita({"bob"}) as pair:
        assert pair.rita is not None
        places = pair.rita.endpoint.candidates()
        session = await pair.alice.endpoint.connect(pair.rita.endpoint.peer, places)
        service = f"{RELAY}{identity('bob').peer}"
        streams = [await session.open(service) for _ in range(CAPS[Standing.STRANGER].streams + 1)]
        for stream in streams[:-1]:
            assert await stream.receive_some() == bytes((Carries.TRAFFIC.value,))
        with pytest.raises(StreamReset, match="too many streams are relayed"):
            await streams[-1].receive_some()


async def test_no_way_leads_through_two_relays(clock: object) -> None:
    async with through_rita({"alice", "bob", "sam"}) as pair:
        assert pair.rita is not None
        sam = await start_relay(
            pair.nursery, pair.world.host("11.0.0.8"), "sam", transports=("relay", "tcp")
        )
        await reach_through(pair.rita, sam)
        [through_rita_to_sam, *_] = [
            one for one in sam.endpoint.candidates() if one.via == pair.rita.endpoint.peer
        ]
        session = await pair.bob.endpoint.connect(sam.endpoint.peer, [through_rita_to_sam])
        assert session.stats.link_kind == "relay"
        with pytest.raises(TunnelError, match="reached through a relay"):
            await pair.bob.endpoint.relaying.reserve(session, sam.endpoint.candidates())
        stream = await session.open(RESERVE)
        with pytest.raises(StreamReset, match="through another relay"):
            await stream.receive_some()


async def test_a_service_that_names_no_peer_is_refused(clock: object) -> None:
    async with two_nodes() as pair:
        assert pair.rita is not None
        session = pair.alice.endpoint.session(pair.rita.endpoint.peer)
        assert session is not None
        for words in ("", "nobody", str(pair.alice.endpoint.peer), "a" * 240):
            stream = await session.open(f"{RELAY}{words}")
            with pytest.raises(StreamError):
                await stream.receive_some()


# --- what may go wrong -------------------------------------------------------------------------


async def test_a_peer_that_goes_takes_its_relayed_links_with_it(clock: object) -> None:
    async with two_nodes() as pair:
        session = await pair.connect()
        pair.bob.stop()
        with trio.fail_after(GONE_BY_RELAYS_AFTER_S + 5):  # its goodbye may have got lost
            await session.closed.wait()
        await trio.sleep(1)
        assert relay_of(pair).reservations() == {identity("alice").peer}
        assert relay_of(pair).streams == 0


async def test_streams_survive_a_relay_that_restarts(clock: object) -> None:
    async with two_nodes() as pair:
        assert pair.rita is not None
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream = await session.open("echo")
        pair.rita.stop()
        await stream.send_all(b"hel")
        await trio.sleep(5)
        assert session.suspected
        rita = await start_relay(pair.nursery, pair.rita.host, "rita", port=4433)
        await reach_through(rita, pair.alice, pair.bob)
        await stream.send_all(b"lo")
        await stream.send_eof()
        received = b""
        while piece := await stream.receive_some():
            received += piece
        assert received == b"hello"
        assert pair.alice.endpoint.session(session.peer) is session


async def alter(data: bytes, sink: Stream) -> None:
    place = len(data) // 2
    await sink.send_all(data[:place] + bytes((data[place] ^ 1,)) + data[place + 1 :])


async def drop(data: bytes, sink: Stream) -> None:
    await sink.send_all(data[: len(data) // 2] + data[len(data) // 2 + 7 :])


async def repeat(data: bytes, sink: Stream) -> None:
    await sink.send_all(data + data[-64:])


async def reorder(data: bytes, sink: Stream) -> None:
    half = len(data) // 2
    await sink.send_all(data[half:] + data[:half])


class HostileRelay(Relay):
    """Does something to the first bytes beyond `after` that it carries for alice."""

    after_bytes = 0.0
    harm = staticmethod(alter)
    done = 0
    carried = 0

    async def _carry(self, near: Stream, far: Stream, carriage: Carriage) -> None:
        self.carried += 1
        await super()._carry(near, far, carriage)

    async def _copy(self, source: Stream, sink: Stream, carriage: Carriage) -> None:
        while data := await source.receive_some():
            carriage.carried_bytes += len(data)
            if carriage.carried_bytes > self.after_bytes and self._is_meant(source, sink):
                self.done += 1
                await self.harm(data, sink)
            else:
                await sink.send_all(data)
        await sink.send_eof()

    def _is_meant(self, source: Stream, sink: Stream) -> bool:
        alice = str(identity("alice").peer)
        return str(source.peer) == alice or str(sink.peer) == alice


def make_hostile(pair: Pair) -> HostileRelay:
    assert pair.rita is not None
    endpoint, honest = pair.rita.endpoint, relay_of(pair)
    hostile = HostileRelay(
        is_member=lambda _: True, session=endpoint.session, carries=honest.carries
    )
    hostile._reserved = honest._reserved
    endpoint.serve(RELAY, hostile.join, JOINING)
    return hostile


@pytest.mark.parametrize("after_bytes", [0, 100_000], ids=["at once", "in the middle"])
@pytest.mark.parametrize("harm", [alter, drop, repeat, reorder])
async def test_what_a_relay_does_to_the_bytes_ends_the_link_and_no_more(
    harm: Callable[[bytes, Stream], object],
    after_bytes: int,
    caplog: pytest.LogCaptureFixture,
    clock: object,
) -> None:
    caplog.set_level(logging.WARNING)
    async with two_nodes() as pair:
        assert pair.rita is not None
        pair.bob.endpoint.serve("echo", echo)
        carol = await start_node(
            pair.nursery, pair.world.host("11.0.0.3"), "carol", transports=("relay",)
        )
        await reach_through(pair.rita, carol)
        hostile = make_hostile(pair)
        hostile.harm = harm  # type: ignore[assignment]
        hostile.after_bytes = after_bytes
        for _ in range(5):
            with contextlib.suppress(DialFailed):
                assert await takes(await pair.connect(), MIB) < MIB
            await trio.sleep(1)
        assert hostile.done > 0
        assert hostile.carried < 20, "not tried again and again"
        warnings = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert len(warnings) <= 2, [one.getMessage() for one in warnings]
        # The others go on.
        session = await carol.endpoint.connect(
            pair.bob.endpoint.peer, pair.bob.endpoint.candidates()
        )
        assert await takes(session, MIB) == MIB


async def test_a_relay_that_joins_us_to_somebody_else_is_told_of_and_not_believed(
    caplog: pytest.LogCaptureFixture,
    clock: object,
) -> None:
    class Confused(Relay):
        async def _reach(self, near: Stream) -> Stream:
            session = self._session(identity("carol").peer)
            assert session is not None
            return await session.open(f"{RELAYED}{near.peer}")

    async with two_nodes() as pair:
        assert pair.rita is not None
        carol = await start_node(
            pair.nursery, pair.world.host("11.0.0.3"), "carol", transports=("relay",)
        )
        await reach_through(pair.rita, carol)
        honest = relay_of(pair)
        liar = Confused(
            is_member=lambda _: True, session=pair.rita.endpoint.session, carries=honest.carries
        )
        pair.rita.endpoint.serve(RELAY, liar.join, JOINING)
        with pytest.raises(DialFailed, match=f"{identity('carol').peer.short} answers there"):
            await pair.connect()
        with pytest.raises(DialFailed, match="altered"):
            await pair.connect()
        assert pair.guests() == []
        assert identity("rita").peer.short in caplog.text


async def test_a_relay_that_falls_silent_is_given_up_like_any_peer(clock: object) -> None:
    async with two_nodes() as pair:
        session: Session = await pair.connect()
        assert pair.rita is not None
        pair.rita.kill()
        with trio.fail_after(15):
            await session.closed.wait()
        await trio.sleep(5)
        assert pair.bob.endpoint.candidates() == []
