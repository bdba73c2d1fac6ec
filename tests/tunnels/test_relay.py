"""Two nodes that cannot reach each other, joined by a third that cannot read what they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from tests.lab.nodes import (
    echo,
    exchange,
    identity,
    reach_through,
    start_node,
    start_relay,
    two_nodes,
)
from tests.lab.relays import relay_of, through_rita
from tests.tunnels.conftest import over_a_relay
from tunnels import Candidate, Session, Stream
from tunnels.redial import GONE_BY_RELAYS_AFTER_S
from tunnels.relay import Relay
from tunnels.relay_caps import Carriage

pytestmark = [pytest.mark.usefixtures("link_kind"), over_a_relay]


SECRET = b"the bank's number is 4711; "


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


async def test_the_way_through_a_relay_is_back_with_it_however_often_it_restarts(
    clock: object,
) -> None:
    async with two_nodes() as pair:
        assert pair.rita is not None
        pair.bob.endpoint.serve("echo", echo)
        session = await pair.connect()
        stream, rita = await session.open("echo"), pair.rita
        for _ in range(3):
            rita.stop()
            await trio.sleep(2)
            rita = await start_relay(pair.nursery, rita.host, "rita", port=4433)
            await reach_through(rita, pair.alice, pair.bob)
            with trio.fail_after(2):
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"


async def test_a_relay_that_falls_silent_is_given_up_like_any_peer(clock: object) -> None:
    async with two_nodes() as pair:
        session: Session = await pair.connect()
        assert pair.rita is not None
        pair.rita.kill()
        with trio.fail_after(15):
            await session.closed.wait()
        await trio.sleep(5)
        assert pair.bob.endpoint.candidates() == []
