"""A node behind a NAT made of memory finds out how it looks from outside, and notices changes."""

from __future__ import annotations

import errno
import socket as sockets
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from tests.lab.datagrams import FakeSocket, World
from tests.lab.nats import Internet, Kind, Router
from tests.lab.nodes import start_node
from tunnels import outside
from tunnels.binding import Address
from tunnels.demux import SharedSocket
from tunnels.meeting import Nats
from tunnels.outside import CHECK_S, KEEP_ALIVE_S, OutsideView, resolve
from tunnels.peer import Candidate, NatKind
from tunnels.stun import Server, Success, encode
from tunnels.stun_port import StunPort
from tunnels.udp import Unreachable

HOME, HOME6 = "192.168.1.2", "2001:db8:1::2"
WAN = "11.0.0.1"
PORT = 4433
STUN_PORT = 3478
A, B, C = "11.0.1.1", "11.0.1.2", "11.0.1.3"
A6, B6 = "2001:db8:a::1", "2001:db8:b::1"


def router(nat: str, *, keeps_port: bool = True) -> Router:
    """Of the NAT kind as a user would name it."""
    kind = {"easy": Kind.PORT_RESTRICTED, "hard": Kind.SYMMETRIC}.get(nat, Kind.FIREWALL)
    made = Router(WAN, kind, blocks_udp=nat == "blocked")
    if not keeps_port:
        made.rebind()
    return made


class Everywhere:
    """A socket bound to every address of its machine."""

    def __init__(self, socket: FakeSocket) -> None:
        self.local = ("::", PORT)
        self.on_unreachable: Unreachable | None = None
        self.send, self.receive = socket.send, socket.receive
        self.flush, self.close = socket.flush, socket.close


class View(OutsideView):
    """With an event for its changes, another one after each."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._on_change = self._tell
        self.changed = trio.Event()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()


@dataclass
class Lab:
    internet: Internet
    nursery: trio.Nursery
    names: dict[str, Sequence[Address]] = field(default_factory=dict)
    slow_names: frozenset[str] = frozenset()

    @property
    def world(self) -> World:
        return self.internet.world

    async def resolve(self, server: Server) -> Sequence[Address]:
        if server.host in self.slow_names:
            await trio.sleep(5)
        return self.names.get(server.host, [(server.host, server.port)])

    def add_server(self, host: str, says: Address | None = None) -> None:
        """A node that answers, with the truth or with what it `says`."""
        socket = SharedSocket(self.internet.host(host).bind(None, STUN_PORT))

        def lie(datagram: bytes, sender: Address) -> None:
            assert says is not None
            socket.send([encode(Success(datagram[8:20], says))], sender)

        if says is None:
            StunPort(socket)
        else:
            socket.on_stun = lie
        self.nursery.start_soon(socket.run)

    def view(
        self,
        nat: str,
        servers: Collection[str] | None,
        *,
        keeps_port: bool = True,
        own: Sequence[str] = (HOME,),
        peers: Sequence[Address] = (),
        near: str | None = None,
    ) -> tuple[View, Router]:
        """A node behind a router, running."""
        before = router(nat, keeps_port=keeps_port)
        host = self.internet.host(*own, behind=self.internet.network(before), near=near)
        shared = SharedSocket(Everywhere(host.bind(None, PORT)))
        asked = None if servers is None else [Server(one, STUN_PORT) for one in servers]
        view = View(host, asked, lambda: peers, resolve=self.resolve)
        self.nursery.start_soon(shared.run)
        self.nursery.start_soon(view.run, shared)
        return view, before

    def asked_at(self, *hosts: str) -> int:
        """How many questions came to these servers since the last call."""
        count = sum(to[0] in hosts and to[1] == STUN_PORT for to, _ in self.world.log)
        self.world.log.clear()
        return count


@asynccontextmanager
async def lab() -> AsyncIterator[Lab]:
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            world = World()
            world.record = True
            nursery.start_soon(world.run)
            yield Lab(Internet(world), nursery)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def behind_easy_nat() -> AsyncIterator[tuple[Lab, View, Router]]:
    """A node that knows how it looks from outside: two servers have answered."""
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, nat = world.view("easy", [A, B])
        await view.checked.wait()
        yield world, view, nat


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


async def test_a_mapping_is_kept_open_by_one_small_question_now_and_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with behind_easy_nat() as (world, _, _):
        began_s = trio.current_time()
        world.asked_at(A)
        await trio.sleep(2 * KEEP_ALIVE_S + 1)
        assert trio.current_time() - began_s < CHECK_S
        questions = [to for to, _ in world.world.log if to[1] == STUN_PORT]
        assert len(questions) == 2
        assert len(set(questions)) == 1
        world.asked_at(B)
        await trio.sleep(CHECK_S - 2 * KEEP_ALIVE_S)
        assert world.asked_at(B) == 1, "each minute all are asked"


@pytest.mark.parametrize("kind", ["none", "hard"])
async def test_where_there_is_nothing_to_keep_open_nothing_is_sent(
    autojump_clock: trio.testing.MockClock, kind: str
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, _ = world.view(kind, [A, B])
        await view.checked.wait()
        world.asked_at(A, B)
        await trio.sleep(CHECK_S - 1)
        assert world.asked_at(A, B) == 0
        await trio.sleep(2)
        assert world.asked_at(A, B) == 2


async def test_a_router_that_forgot_us_is_noticed(autojump_clock: trio.testing.MockClock) -> None:
    async with behind_easy_nat() as (_, view, nat):
        (before,) = view.candidates()
        changed, since_s = view.changed, trio.current_time()
        nat.rebind()
        await changed.wait()
        (after,) = view.candidates()
        assert after.host == before.host
        assert after.port != before.port
        assert trio.current_time() - since_s <= KEEP_ALIVE_S + 1


@pytest.mark.parametrize(
    ("nat", "kind", "within_s"), [("hard", NatKind.HARD, 1), ("blocked", NatKind.BLOCKED, 5)]
)
async def test_another_network_is_looked_at_and_believed_at_once(
    autojump_clock: trio.testing.MockClock, nat: str, kind: NatKind, within_s: float
) -> None:
    async with behind_easy_nat() as (_, view, here):
        other, changed, since_s = router(nat), view.changed, trio.current_time()
        here.kind, here.blocks_udp = other.kind, other.blocks_udp
        view.check_now()
        await changed.wait()
        assert view.facts(4).kind is kind
        assert trio.current_time() - since_s < within_s


async def test_while_nobody_answers_they_are_asked_again_soon(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, nat = world.view("easy", [A, B])
        nat.blocks_udp = True
        await view.checked.wait()
        nat.blocks_udp, changed, since_s = False, view.changed, trio.current_time()
        await changed.wait()
        assert view.facts(4).kind is NatKind.EASY
        assert trio.current_time() - since_s <= outside.CHECK_AGAIN_S + 1


async def test_an_outage_changes_nothing_of_what_is_known(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with behind_easy_nat() as (_, view, nat):
        changed, before = view.changed, view.candidates()
        nat.blocks_udp = True
        await trio.sleep(KEEP_ALIVE_S + 10)
        nat.blocks_udp = False
        await trio.sleep(CHECK_S)
        assert not changed.is_set()
        assert view.candidates() == before


async def test_a_network_that_begins_to_block_is_found_out_after_a_while(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with behind_easy_nat() as (_, view, nat):
        nat.blocks_udp, changed, since_s = True, view.changed, trio.current_time()
        await changed.wait()
        assert view.facts(4).kind is NatKind.BLOCKED
        assert 20 < trio.current_time() - since_s < 2 * CHECK_S


async def test_a_check_that_finds_what_was_known_is_no_change(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with behind_easy_nat() as (_, view, _):
        changed = view.changed
        await trio.sleep(5 * CHECK_S)
        assert not changed.is_set()


async def test_a_name_that_is_not_known_is_a_hint_and_no_error(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        world.names = {"good.example": [(B, STUN_PORT)], "bad.example": [], "slow.example": []}
        world.slow_names = frozenset({"slow.example"})
        view, _ = world.view("easy", ["bad.example", "slow.example", A, "good.example"])
        await view.changed.wait()
        assert view.facts(4).kind is NatKind.EASY
        assert trio.current_time() < 1, "a name server that is silent holds up nobody"
        await view.checked.wait()
        assert [one.host for one in view.unresolved] == ["bad.example", "slow.example"]

        world.slow_names = frozenset()
        world.names["slow.example"] = [(C, STUN_PORT)]
        view.check_now()
        await trio.sleep(10)
        assert [one.host for one in view.unresolved] == ["bad.example"], "it is looked up again"


async def test_a_name_that_is_lost_is_asked_where_it_was(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.names = {"good.example": [(A, STUN_PORT)]}
        view, _ = world.view("easy", ["good.example"])
        await view.checked.wait()
        world.names = {"good.example": []}
        await trio.sleep(outside.NAMES_FRESH_S + 2 * CHECK_S)
        assert view.facts(4).answered == 1


async def test_another_network_may_give_a_name_another_address(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        world.names = {"good.example": [(A, STUN_PORT)]}
        view, _ = world.view("easy", ["good.example"])
        await view.checked.wait()
        world.names = {"good.example": [(B, STUN_PORT)]}
        await trio.sleep(CHECK_S + 1)
        assert list(view.answers) == [(A, STUN_PORT)], "it is not looked up each time"
        view.check_now()
        await trio.sleep(1)
        assert list(view.answers) == [(B, STUN_PORT)]


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


async def test_two_names_of_one_server_are_asked_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.names = {name: [(A, STUN_PORT)] for name in ("one.example", "other.example")}
        view, _ = world.view("easy", ["one.example", "other.example"])
        await view.checked.wait()
        assert world.asked_at(A) == 1


async def test_no_more_than_a_few_are_asked(autojump_clock: trio.testing.MockClock) -> None:
    async with lab() as world:
        peers = [(f"11.0.9.{n}", STUN_PORT) for n in range(20)]
        view, _ = world.view("easy", [], peers=[*peers, peers[0]])
        await view.checked.wait()
        assert view.facts(4).asked == outside.MAX_SERVERS


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


async def test_a_network_that_changes_while_we_look_is_looked_at_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        view, nat = world.view("easy", [A, B])
        nat.blocks_udp = True
        await trio.sleep(1)
        nat.blocks_udp = False
        view.check_now()
        await view.checked.wait()
        await trio.sleep(1)
        assert view.facts(4).kind is NatKind.EASY


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


async def test_a_node_that_comes_into_another_network_looks_at_it_at_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.add_server(B)
        before = router("easy")
        home = world.internet.host(HOME, behind=world.internet.network(before))
        servers = [Server(host, STUN_PORT) for host in (A, B)]
        started = await start_node(world.nursery, home, "node", port=PORT, stun=servers)
        view = started.endpoint.outside
        await view.checked.wait()
        assert view.facts(4).kind is NatKind.EASY
        before.kind = Kind.SYMMETRIC
        home.changes.unpark_all()
        await trio.sleep(1)
        assert view.facts(4).kind is NatKind.HARD


# --- names --------------------------------------------------------------------------------------


class Resolver:
    """What trio asks in place of the system."""

    def __init__(self, outcome: object) -> None:
        self.outcome = outcome

    async def getaddrinfo(self, host: Any, port: Any, *rest: Any) -> Any:
        if self.outcome is None:
            await trio.sleep_forever()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    async def getnameinfo(self, *_: Any) -> Any:
        raise NotImplementedError


def entry(host: str) -> tuple[object, ...]:
    address = (host, 3478, 0, 0) if ":" in host else (host, 3478)
    family = sockets.AF_INET6 if ":" in host else sockets.AF_INET
    return (family, sockets.SOCK_DGRAM, 17, "", address)


@pytest.mark.parametrize(
    ("outcome", "found"),
    [
        ([entry(B6), entry(A), entry(B)], [(B6, 3478), (A, 3478)]),
        (sockets.gaierror(errno.ENOENT, "no such name"), []),
        (None, []),
    ],
    ids=["one of each version", "unknown", "silence"],
)
async def test_a_name_is_looked_up_without_blocking(
    autojump_clock: trio.testing.MockClock, outcome: object, found: list[Address]
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(outcome))  # type: ignore[arg-type]
    assert await resolve(Server("stun.example", 3478)) == found


async def test_what_cannot_be_a_name_is_not_one() -> None:
    assert await resolve(Server("a" * 64 + ".example", 3478)) == []


async def test_a_literal_needs_no_name_server() -> None:
    assert await resolve(Server("::1", 3478)) == [("::1", 3478)]
