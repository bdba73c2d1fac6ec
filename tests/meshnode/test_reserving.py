"""Members of a mesh that reach each other only through one of them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from discovery.grants import Role
from discovery.token import encode, parse_untrusted
from meshnode.whereabouts import Whereabouts
from tests.lab.datagrams import World
from tests.lab.parties import Party, party, recorded_messages, run_all, world_of_parties
from tunnels import PeerId, Stream
from tunnels.relay import RESERVE, RESERVING, Carries
from tunnels.relay_caps import Standing


def run(*nodes: Party) -> None:
    run_all(*nodes)
    for node in nodes:
        kept = node.connections
        whereabouts = Whereabouts(node.endpoint, kept.introduced, kept.show_again)
        node.nursery.start_soon(whereabouts.run)


@asynccontextmanager
async def apart(
    folder: Path, carries: Carries = Carries.TRAFFIC, *, udp: bool = False
) -> AsyncIterator[tuple[World, Party, Party, Party]]:
    """rita, who can be dialled; ann and ben, who can dial only, without `udp` over TCP alone."""
    async with world_of_parties() as world, AsyncExitStack() as stack:
        hosts = [world.host(f"11.0.0.{n}") for n in (9, 1, 2)]
        world.hidden = {"11.0.0.1", "11.0.0.2"}
        world.without_udp = set() if udp else set(world.hidden)
        rita = await stack.enter_async_context(party(folder, hosts[0], "rita", carries=carries))
        ann, ben = [
            await stack.enter_async_context(party(folder, host, name))
            for host, name in zip(hosts[1:], ("ann", "ben"), strict=True)
        ]
        run(rita, ann, ben)
        yield world, rita, ann, ben


async def test_members_keep_a_reservation_and_say_so_in_their_invites(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with apart(tmp_path) as (_, rita, ann, _ben):
        await ann.connections.join(rita.invite())
        await trio.sleep(2)
        [way, *_] = ann.endpoint.candidates()
        assert (way.transport, way.via) == ("relay", rita.peer)
        invite = parse_untrusted(encode(ann.invite(mesh=rita.mesh)))
        assert invite.relays == (rita.peer,)


async def test_a_joiner_comes_in_through_the_relay_and_is_known_to_it_then(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with apart(tmp_path) as (_, rita, ann, ben):
        await ann.connections.join(rita.invite())
        await trio.sleep(2)
        invite = parse_untrusted(encode(ann.invite(mesh=rita.mesh)))
        await ben.connections.join(invite)
        assert ben.session(ann).stats.link_kind == "relay"
        assert ben.knows(ann)
        assert ben.knows(rita), "the new grant was shown to the relay at once"
        relay = rita.endpoint.relaying.relay
        assert relay is not None
        assert relay._standing(ben.peer) is Standing.CARRIED
        await trio.sleep(10)
        assert relay.reservations() == {ann.peer, ben.peer}
        assert len(ben.endpoint.relaying.reservations()) == 1


async def test_members_learn_from_others_through_which_relay_a_third_is_reached(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with apart(tmp_path) as (_, rita, ann, ben):
        await ann.connections.join(rita.invite())
        await ben.connections.join(rita.invite())
        await trio.sleep(60)
        assert ann.knows(ben)
        assert ben.session(ann).stats.link_kind == "relay"


async def test_through_the_relay_two_find_the_straight_path_that_there_is(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with apart(tmp_path, udp=True) as (_, rita, ann, ben):
        await ann.connections.join(rita.invite())
        await trio.sleep(2)
        await ben.connections.join(ann.invite(mesh=rita.mesh))
        assert ben.session(ann).stats.link_kind == "relay"
        await trio.sleep(10)
        assert ben.session(ann).stats.link_kind == "quic"


async def test_a_relay_is_named_to_members_of_its_own_mesh_alone(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with apart(tmp_path) as (world, rita, ann, ben), AsyncExitStack() as stack:
        await ann.connections.join(rita.invite())
        await trio.sleep(5)
        [*_, held] = ann.endpoint.relaying.reservations()
        assert held.relay == rita.peer
        eve = await stack.enter_async_context(party(tmp_path, world.host("11.0.0.7"), "eve"))
        run(eve)
        assert parse_untrusted(encode(ann.invite())).relays == (), "into the mesh ann founded"
        with recorded_messages() as sent:
            await ann.connections.join(eve.invite())
            await ben.connections.join(eve.invite())
            await trio.sleep(60)
        assert ann.knows(eve)
        for hearer in (eve, ben):
            told = [message for message in sent if message.to == hearer.peer]
            assert told
            assert not any(message.mentions(rita.peer.key) for message in told)


async def test_a_relay_that_restarts_is_used_again_within_seconds(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with apart(tmp_path) as (world, rita, ann, ben):
        for one in (ann, ben):
            await one.connections.join(rita.invite())
        await trio.sleep(60)
        rita.stop()
        await trio.sleep(20)
        assert not ann.endpoint.relaying.reservations()
        assert ann.session(ben).suspected
        host = world.host("11.0.0.9")
        async with party(tmp_path, host, "rita", carries=Carries.TRAFFIC) as again:
            run(again)
            await trio.sleep(40)
            assert ann.endpoint.relaying.reservations()
            assert ann.knows(ben)
            assert not ann.session(ben).suspected
            assert ann.session(ben).stats.link_kind == "relay"


async def test_without_a_relay_a_member_that_can_be_dialled_introduces(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with apart(tmp_path, Carries.INTRODUCTIONS) as (_, rita, ann, ben):
        await ann.connections.join(rita.invite())
        await ben.connections.join(rita.invite())
        await trio.sleep(60)
        assert [one.carries for one in ann.endpoint.relaying.reservations()] == [
            Carries.INTRODUCTIONS
        ]
        assert ann.knows(ben)
        assert not rita.endpoint.relaying.reservations(), "who is dialled by all needs nobody"


async def test_a_member_by_the_role_of_a_relay_carries_for_the_others(
    tmp_path: Path, autojump_clock: object
) -> None:
    async with apart(tmp_path) as (world, _, ann, ben), AsyncExitStack() as stack:
        founder = await stack.enter_async_context(party(tmp_path, world.host("11.0.0.7"), "tom"))
        rhea = await stack.enter_async_context(
            party(tmp_path, world.host("11.0.0.8"), "rhea", carries=Carries.TRAFFIC)
        )
        run(founder, rhea)
        await rhea.connections.join(founder.invite(Role.RELAY))
        assert rhea.membership.role_in(founder.mesh) is Role.RELAY
        for one in (ann, ben):
            await one.connections.join(founder.invite())
        await trio.sleep(60)
        for one in (ann, ben):
            held = one.endpoint.relaying.reservations()
            assert [reservation.relay for reservation in held] == [rhea.peer]
        assert ann.knows(ben)
        assert not founder.lets_in(rhea), "it carries, and opens nothing"


@pytest.mark.parametrize("how", ["silent", "fickle"])
async def test_members_that_call_themselves_relays_do_not_keep_the_honest_one_out(
    how: str, tmp_path: Path, autojump_clock: object
) -> None:
    """There are more of them than a member has reservations, and they are asked first."""
    asked: list[tuple[PeerId, float]] = []

    async def hold_up(stream: Stream) -> None:
        asked.append((stream.peer, trio.current_time()))
        if how == "silent":
            await trio.sleep_forever()
        await stream.send_all(bytes((Carries.TRAFFIC.value,)))
        await stream.send_eof()

    async with apart(tmp_path) as (world, rita, ann, ben), AsyncExitStack() as stack:
        for number in range(3):
            host = world.host(f"11.0.0.{20 + number}")
            liar = await stack.enter_async_context(
                party(tmp_path, host, f"liar{number}", carries=Carries.TRAFFIC)
            )
            liar.endpoint.serve(RESERVE, hold_up, RESERVING)
            run(liar)
            await liar.connections.join(rita.invite())
        await ann.connections.join(rita.invite())
        await trio.sleep(1)
        ann.session(rita).end("so that the others are asked first")
        await trio.sleep(60)
        times = [when_s for asker, when_s in asked if asker == ann.peer]
        assert len(times) >= 3
        assert rita.peer in [one.relay for one in ann.endpoint.relaying.reservations()]
        await trio.sleep(240)
        assert rita.peer in [one.relay for one in ann.endpoint.relaying.reservations()]
        times = [when_s for asker, when_s in asked if asker == ann.peer]
        assert len([one for one in times if one > trio.current_time() - 120]) <= 3 * 120 / 60
        await ben.connections.join(ann.invite(mesh=rita.mesh))
        assert ben.knows(ann)
