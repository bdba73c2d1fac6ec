"""For whom a relay works, and how much: members, strangers, nobody."""

from __future__ import annotations

import pytest

from tests.lab.nodes import exchange, identity, reach_through, start_node, start_relay, two_nodes
from tests.lab.relays import reach, relay_of, takes, through_rita
from tests.tunnels.conftest import over_a_relay
from tunnels import DialFailed, StreamError, StreamReset, TunnelError
from tunnels.relay import RELAY, RELAYED, RESERVE, Carries
from tunnels.relay_caps import CAPS, KIB, MIB, Standing

pytestmark = [pytest.mark.usefixtures("link_kind"), over_a_relay]


async def test_only_members_reserve(clock: object) -> None:
    async with through_rita({"bob"}) as pair:
        with pytest.raises(StreamError, match="not offered"):
            await reach(pair, pair.alice)
        assert pair.alice.endpoint.candidates() == []
        assert relay_of(pair).reservations() == {identity("bob").peer}


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
