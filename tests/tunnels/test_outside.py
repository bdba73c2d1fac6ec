"""A node behind a NAT made of memory finds out how it looks from outside."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.lab.datagrams import World
from tests.lab.nodes import start_node
from tests.lab.outside import A6, B6, HOME, HOME6, PORT, STUN_PORT, WAN, A, B, C, lab, router
from tunnels import outside
from tunnels.demux import SharedSocket
from tunnels.meeting import Nats
from tunnels.outside import OutsideView
from tunnels.peer import Candidate, NatKind, PeerId
from tunnels.stun import Server, Success, encode
from tunnels.stun_port import StunPort


@pytest.mark.parametrize(
    ("nat", "kind", "candidates"),
    [
        ("none", NatKind.NONE, 0),
        ("easy", NatKind.EASY, 1),
        ("hard", NatKind.HARD, 0),
        ("blocked", NatKind.BLOCKED, 0),
    ],
)
async def test_each_kind_of_nat_is_known_for_what_it_is(
    autojump_clock: trio.testing.MockClock, nat: str, kind: NatKind, candidates: int
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, _ = world.view(nat, [A, B])
        await view.checked.wait()
        assert view.facts(4).kind is kind
        expected = [Candidate("quic", WAN, PORT, "reflexive")] * candidates
        assert view.candidates() == expected
        assert view.nats() == Nats(kind, NatKind.UNKNOWN)
        assert [one.host for one in view.guesses()] == [WAN] * (nat == "hard")


async def test_ipv4_and_ipv6_are_looked_at_apart(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        for host in (A, B, A6):
            world.add_server(host)
        view, _ = world.view("easy", [A, B, A6], keeps_port=False, own=(HOME, HOME6))
        await view.checked.wait()
        assert view.facts(4).kind is NatKind.EASY
        assert view.facts(4).keeps_port is False
        assert view.facts(6).kind is NatKind.NONE
        assert [one.host for one in view.candidates()] == [WAN]


async def test_a_machine_without_ipv6_asks_nobody_there(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        view, _ = world.view("blocked", [A6, B6])
        await view.checked.wait()
        assert view.facts(6).kind is NatKind.UNKNOWN
        assert view.facts(6).asked == 0


async def test_the_first_two_that_answer_are_enough(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, _ = world.view("easy", [A, B, C])
        began_s = trio.current_time()
        await view.known.wait()
        assert view.facts(4).kind is NatKind.EASY
        assert trio.current_time() - began_s < 0.2, "the third is silent, and nobody waits for it"


async def test_a_server_that_lies_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        world.add_server(A, says=("11.66.66.66", 666))
        world.add_server(B)
        world.add_server(C)
        view, _ = world.view("easy", [A, B, C])
        await view.checked.wait()
        assert view.candidates() == [Candidate("quic", WAN, PORT, "reflexive")]


async def test_an_address_that_no_peer_may_dial_is_no_candidate(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A, says=("224.0.0.1", 53))
        view, _ = world.view("easy", [A])
        await view.checked.wait()
        assert view.facts(4).mapped == (("224.0.0.1", 53),)
        assert view.candidates() == []


async def test_members_that_are_not_on_our_network_tell_us_too(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        for host in (A, B, "192.168.1.9"):
            world.add_server(host)
        peers = [(host, STUN_PORT) for host in (A, B, "192.168.1.9")]
        view, _ = world.view("easy", [], peers=peers, near="192.168.")
        await view.checked.wait()
        assert view.facts(4).kind is NatKind.EASY
        assert set(view.answers) == set(peers[:2]), "a neighbour sees what we see"


async def test_no_more_than_a_few_are_asked(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        servers, peers = ([f"11.0.{net}.{n}" for n in range(20)] for net in (8, 9))
        view, _ = world.view("easy", servers, peers=[(host, STUN_PORT) for host in peers])
        await view.checked.wait()
        asked = [host for host, _ in view.answers]
        assert len(asked) == outside.MAX_SERVERS
        assert len(set(asked) & set(peers)) == outside.MAX_PEERS


async def test_members_that_lie_take_no_server_s_place(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        for server in (A, B, C):
            world.add_server(server)
        liars = [f"11.0.9.{n}" for n in range(6)]
        for liar in liars:
            world.add_server(liar, says=("11.66.66.66", 666))
        peers = [(host, STUN_PORT) for host in liars]
        view, _ = world.view("easy", [A, B, C], peers=peers)
        await view.checked.wait()
        assert view.facts(4).mapped[0] == (WAN, PORT)


async def test_a_network_has_one_voice(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        neighbours = [(f"2001:db8:a::{n}", STUN_PORT) for n in range(1, 5)]
        view, _ = world.view("easy", [], peers=[*neighbours, (B6, STUN_PORT)], own=(HOME6,))
        await view.checked.wait()
        assert set(view.answers) == {neighbours[0], (B6, STUN_PORT)}


async def test_who_asks_nobody_answers_all_the_same(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        world.add_server(A)  # a node that asks nobody
        view, _ = world.view("easy", [A])
        await view.checked.wait()
        assert view.facts(4).answered == 1
        silent, _ = world.view("easy", None, own=("192.168.1.3",))
        await silent.checked.wait()
        assert silent.answers == {}


async def test_noise_is_no_answer(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        view, _ = world.view("easy", [A])
        await trio.sleep(0.01)
        (question,) = {data for to, data in world.world.log if to == (A, STUN_PORT)}
        forged = encode(Success(question[8:20], ("11.66.66.66", 666)))
        world.world.inject(forged, (B, STUN_PORT), (HOME, PORT))
        world.world.inject(forged[:-1], (A, STUN_PORT), (HOME, PORT))
        world.world.inject(b"\0\1" + forged[2:], (A, STUN_PORT), (HOME, PORT))
        world.world.inject(encode(Success(bytes(12), (B, 1))), (A, STUN_PORT), (HOME, PORT))
        await view.checked.wait()
        assert view.facts(4).mapped == ()


async def test_a_question_given_up_by_its_asker_is_forgotten(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        socket = SharedSocket(world.internet.host(HOME).bind(None, PORT))
        port = StunPort(socket)
        world.nursery.start_soon(socket.run)
        world.nursery.start_soon(port.run)
        with trio.move_on_after(0.001):
            await port.ask((A, STUN_PORT))
        await trio.sleep(1)
        assert await port.ask((A, STUN_PORT)) == (HOME, PORT)


async def test_without_udp_nobody_is_asked() -> None:
    view = OutsideView(World().host(HOME), [Server(A, STUN_PORT)])
    await view.run(None)
    assert view.checked.is_set()
    assert view.candidates() == []


async def test_a_node_behind_a_nat_tells_where_it_is_seen(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        peers = [
            await start_node(world.nursery, world.internet.host(host), name)
            for host, name in ((A, "anna"), (B, "bert"))
        ]
        home = world.internet.host(HOME, behind=world.internet.network(router("easy")))
        started = await start_node(world.nursery, home, "node", port=PORT, stun=())
        node = started.endpoint
        for peer in peers:
            await node.connect(peer.endpoint.peer, peer.endpoint.candidates())
        await node.candidates_changed.wait()
        assert node.outside.facts(4).kind is NatKind.EASY
        assert Candidate("quic", WAN, PORT, "reflexive") in node.candidates()


async def test_strangers_are_not_asked_how_we_look(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        peers = {
            name: await start_node(world.nursery, world.internet.host(host), name)
            for host, name in ((A, "anna"), (B, "sam"))
        }
        stranger = peers["sam"].endpoint.peer
        home = world.internet.host(HOME, behind=world.internet.network(router("easy")))

        def authorize(peer: PeerId, _service: str) -> bool:
            return peer != stranger

        node = await start_node(
            world.nursery, home, "node", port=PORT, stun=(), authorize=authorize
        )
        for peer in peers.values():
            await node.endpoint.connect(peer.endpoint.peer, peer.endpoint.candidates())
        await trio.sleep(2 * outside.CHECK_S)
        assert [host for host, _ in node.endpoint.outside.answers] == [A]
