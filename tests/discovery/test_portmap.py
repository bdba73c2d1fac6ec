"""A node behind a router: its ports are mapped, kept mapped and given back, whatever the router."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio
import trio.testing

from discovery.gateway import Gateway, find_gateway, parse_proc_route, parse_routes
from discovery.mappers import MAX_DATAGRAMS
from discovery.nat_pmp import parse_answer_untrusted
from discovery.portmap import CHECK_S, GOODBYE_S, PortMap, PortMapStatus, describe, survey
from tests.discovery.routers import (
    GATEWAY,
    OURS,
    OUTSIDE,
    description,
    http_answer,
    ssdp_answer,
)
from tests.lab.datagrams import Weather, World
from tests.lab.routers import EVERYTHING, MAP_PORT, SSDP_PORT, WEB_PORT, Router
from tunnels.peer import Candidate

PORTS = {"quic": 4242, "tcp": 4242}
BOTH_OPEN = {("UDP", 4242): (OURS, 4242), ("TCP", 4242): (OURS, 4242)}
BOTH = [Candidate(kind, OUTSIDE, 4242, "mapped") for kind in ("quic", "tcp")]

Clock = trio.testing.MockClock


@dataclass
class Home:
    """A network with a router, and a node in it."""

    world: World
    router: Gateway | None
    portmap: PortMap
    nursery: trio.Nursery
    scope: trio.CancelScope
    told: list[PortMapStatus]
    changed: list[trio.Event] = field(default_factory=lambda: [trio.Event()])

    def change_network(self) -> None:
        self.changed.pop().set()
        self.changed.append(trio.Event())


@asynccontextmanager
async def at_home(
    *routers: Router, world: World | None = None, only_host: str | None = None
) -> AsyncIterator[Home]:
    """The node's default route leads to the first router."""
    world = world or (routers[0].world if routers else World(Weather(delay_s=0.001)))
    told: list[PortMapStatus] = []

    async def gateway() -> Gateway | None:
        return home.router

    async def wait_changed() -> None:
        await home.changed[-1].wait()

    portmap = PortMap(
        lambda: PORTS,
        only_host=only_host,
        network=world.host(OURS),
        gateway=gateway,
        watch=wait_changed,
        tell=told.append,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.run)
        for router in routers:
            nursery.start_soon(router.run)
        await trio.testing.wait_all_tasks_blocked()
        scope = trio.CancelScope()
        first = routers[0].gateway() if routers else None
        home = Home(world, first, portmap, nursery, scope, told)
        stopped = trio.Event()

        async def run() -> None:
            with scope:
                await portmap.run()
            stopped.set()

        nursery.start_soon(run)
        await portmap.settled.wait()
        yield home
        scope.cancel()
        await stopped.wait()
        nursery.cancel_scope.cancel()


def a_router(*speaks: str, **traits: object) -> Router:
    router = Router(World(Weather(delay_s=0.001)), speaks or EVERYTHING)
    for name, value in traits.items():
        setattr(router, name, value)
    return router


# --- honest routers --------------------------------------------------------------------------


@pytest.mark.parametrize("way", EVERYTHING)
async def test_both_ports_are_mapped_and_given_back(autojump_clock: Clock, way: str) -> None:
    router = a_router(way)
    async with at_home(router) as home:
        assert home.portmap.candidates() == BOTH
        assert router.open == BOTH_OPEN
        assert describe(home.portmap.status) == (
            f"the router forwards UDP {OUTSIDE}:4242, TCP {OUTSIDE}:4242 ({way})"
        )
        assert home.told == [home.portmap.status]
    assert router.open == {}


async def test_of_a_router_that_knows_all_ways_one_is_used(autojump_clock: Clock) -> None:
    router = a_router()
    async with at_home(router) as home:
        assert set(router.asked) == {home.portmap.status.by}
        assert len(router.asked) == 2


@pytest.mark.parametrize("way", EVERYTHING)
async def test_mappings_are_renewed_before_they_end(autojump_clock: Clock, way: str) -> None:
    router = a_router(way, grants_s=240)
    async with at_home(router) as home:
        asked_at_first = len(router.asked)
        for _ in range(120):
            await trio.sleep(60)
            assert router.open == BOTH_OPEN
        renewals = (len(router.asked) - asked_at_first) / 2
        assert 3 <= renewals <= 7200 / 120 + 3
        assert len(home.told) == 1  # nothing has changed for the user


@pytest.mark.parametrize("way", EVERYTHING)
async def test_a_router_that_restarted_is_asked_again_within_a_minute(
    autojump_clock: Clock, way: str
) -> None:
    router = a_router(way)
    async with at_home(router) as home:
        await trio.sleep(300)
        router.restart()
        assert router.open == {}
        await trio.sleep(CHECK_S + 1)
        assert router.open == BOTH_OPEN
        assert home.portmap.candidates() == BOTH


@pytest.mark.parametrize("way", ["NAT-PMP", "UPnP"])
async def test_a_new_outside_address_is_noticed(autojump_clock: Clock, way: str) -> None:
    router = a_router(way)
    async with at_home(router) as home:
        router.outside = "11.99.88.77"
        await trio.sleep(CHECK_S + 1)
        assert {one.host for one in home.portmap.candidates()} == {"11.99.88.77"}


async def test_another_router_gets_the_mappings_and_the_old_one_loses_them(
    autojump_clock: Clock,
) -> None:
    old = a_router("PCP")
    new = Router(old.world, ("NAT-PMP",), address="192.168.7.2", outside="11.99.88.77")
    async with at_home(old, new) as home:
        home.router = new.gateway()
        home.change_network()
        await trio.sleep(5)
        assert (old.open, new.open) == ({}, BOTH_OPEN)
        assert home.portmap.status.by == "NAT-PMP"
        # Without a word from the system it is noticed too.
        home.router = old.gateway()
        await trio.sleep(CHECK_S + 5)
        assert (old.open, new.open) == (BOTH_OPEN, {})


async def test_a_network_that_comes_later_is_used_at_once(autojump_clock: Clock) -> None:
    router = a_router("PCP")
    async with at_home(world=router.world) as home:
        assert "no IPv4 router" in describe(home.portmap.status)
        home.nursery.start_soon(router.run)
        await trio.sleep(1000)
        home.router = router.gateway()
        home.change_network()
        await trio.sleep(5)
        assert home.portmap.candidates() == BOTH


async def test_a_router_that_is_silent_for_a_while_is_asked_again(autojump_clock: Clock) -> None:
    router = a_router("PCP")
    async with at_home(router) as home:
        home.world.cut = True
        await trio.sleep(CHECK_S + 10)
        assert home.portmap.candidates() == []
        home.world.cut = False
        await trio.sleep(60)
        assert home.portmap.candidates() == BOTH


async def test_lost_questions_are_repeated(autojump_clock: Clock) -> None:
    router = a_router("PCP")
    router.world.weather = Weather(delay_s=0.001, loss=0.3)
    async with at_home(router) as home:
        await trio.sleep(30)
        assert {one.transport for one in home.portmap.candidates()} == {"quic", "tcp"}
        router.world.weather = Weather(delay_s=0.001)


# --- routers with a will of their own ----------------------------------------------------------


@pytest.mark.parametrize("way", EVERYTHING)
async def test_a_port_that_is_taken_is_mapped_under_another_number(
    autojump_clock: Clock, way: str
) -> None:
    router = a_router(way, taken={4242})
    async with at_home(router) as home:
        places = home.portmap.candidates()
        assert {one.port for one in places} != {4242}
        assert set(router.open.values()) == {(OURS, 4242)}
        kept = router.open
        await trio.sleep(4000)
        assert router.open == kept  # renewed under the number that was given


async def test_a_router_without_leases_is_cleaned_up_all_the_same(autojump_clock: Clock) -> None:
    router = a_router("UPnP", permanent_only=True)
    async with at_home(router) as home:
        assert home.portmap.candidates() == BOTH
        await trio.sleep(10_000)
        assert router.open == BOTH_OPEN
    assert router.open == {}


async def test_what_one_way_refuses_another_may_give(autojump_clock: Clock) -> None:
    router = a_router("PCP", "UPnP", refuses={"PCP": 2})
    async with at_home(router) as home:
        assert home.portmap.status.by == "UPnP"


@pytest.mark.parametrize(
    ("refuses", "said"),
    [
        ({"PCP": 2, "NAT-PMP": 2, "UPnP": 606}, "PCP: port mapping is switched off in it"),
        ({"PCP": 8, "NAT-PMP": 4, "UPnP": 728}, "no room for another mapping"),
    ],
)
async def test_a_refusal_is_told_in_words(
    autojump_clock: Clock, refuses: dict[str, int], said: str
) -> None:
    async with at_home(a_router(refuses=refuses)) as home:
        assert home.portmap.candidates() == []
        assert said in describe(home.portmap.status)


@pytest.mark.parametrize("way", EVERYTHING)
@pytest.mark.parametrize(
    ("outside", "said"), [("192.168.1.4", "double NAT"), ("100.64.1.2", "CGNAT")]
)
async def test_a_router_behind_another_gives_no_candidate_and_says_so(
    autojump_clock: Clock, way: str, outside: str, said: str
) -> None:
    router = a_router(way, outside=outside)
    async with at_home(router) as home:
        assert home.portmap.candidates() == []
        assert said in str(home.portmap.status.problem)
        assert router.open == {}


async def test_without_an_answer_the_remedy_is_told_soon(autojump_clock: Clock) -> None:
    began_s = trio.current_time()
    async with at_home(Router(World(), ())) as home:
        assert trio.current_time() - began_s < 7
        assert "switch on UPnP, NAT-PMP or PCP" in describe(home.portmap.status)


async def test_a_refused_question_is_not_waited_for(autojump_clock: Clock) -> None:
    world = World(Weather(delay_s=0.001))
    world.refusing |= {(GATEWAY, MAP_PORT)}
    router = Router(world, ("UPnP",))
    async with at_home(router) as home:
        assert home.portmap.status.by == "UPnP"


async def test_a_node_on_another_address_asks_nobody(autojump_clock: Clock) -> None:
    router = a_router()
    async with at_home(router, only_host="10.9.8.7") as home:
        assert "listens on 10.9.8.7" in describe(home.portmap.status)
        assert router.world.sent == 0


async def test_the_goodbye_is_bounded(autojump_clock: Clock) -> None:
    router = a_router("PCP")
    async with at_home(router) as home:
        home.world.cut = True
        began_s = trio.current_time()
    assert trio.current_time() - began_s <= GOODBYE_S


# --- hostile ones ------------------------------------------------------------------------------


async def silent(home: Home, began_s: float) -> None:
    assert home.portmap.candidates() == []
    assert trio.current_time() - began_s < 12


@pytest.mark.parametrize(
    "page",
    [
        lambda _q: b"HTTP/1.1 302 Found\r\nLocation: http://192.168.7.66/d.xml\r\n\r\n",
        lambda _q: http_answer(description("http://192.168.7.66/ctl")),
        lambda _q: http_answer(description("http://127.0.0.1:8090/v1/chat/completions")),
        lambda _q: b"HTTP/1.1 200 OK\r\n\r\n" + b"<r>" * 100_000,
        lambda _q: http_answer(b'<!DOCTYPE r [<!ENTITY a "b">]><r>&a;</r>'),
        lambda _q: b"\x16\x03\x01 not http",
        lambda _q: b"",
        lambda _q: b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n<r",
    ],
    ids=["redirect", "elsewhere", "us", "endless", "entities", "tls", "nothing", "cut off"],
)
async def test_a_web_server_that_misleads_is_left_alone(
    autojump_clock: Clock, page: Callable[[bytes], bytes]
) -> None:
    began_s = trio.current_time()
    world = World(Weather(delay_s=0.001))
    # Whoever is led there would be seen.
    elsewhere = world.host("192.168.7.66").listen("192.168.7.66", 80)
    router = Router(world, ("UPnP",), web=page)
    async with at_home(router) as home:
        await silent(home, began_s)
        with trio.move_on_after(30) as nobody_came:
            await elsewhere.accept()
        assert nobody_came.cancelled_caught
        assert "description" in describe(home.portmap.status) or (
            "web server" in describe(home.portmap.status)
        )


async def test_a_web_server_that_never_ends_its_answer_is_given_up(autojump_clock: Clock) -> None:
    began_s = trio.current_time()
    world = World(Weather(delay_s=0.001))
    router = Router(world, ())

    async def drip() -> None:
        listener = world.host(GATEWAY).listen(GATEWAY, WEB_PORT)
        socket = await listener.accept()
        socket.send(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            socket.send(b"<")
            await trio.sleep(0.5)

    async def search() -> None:
        ssdp = world.bind((GATEWAY, SSDP_PORT))
        while True:
            for _, sender in await ssdp.receive():
                ssdp.send([ssdp_answer()], sender)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        nursery.start_soon(search)
        async with at_home(router) as home:
            await silent(home, began_s)
            assert "web server does not answer" in describe(home.portmap.status)
        nursery.cancel_scope.cancel()


async def test_answers_of_other_machines_are_not_heard(autojump_clock: Clock) -> None:
    """Who is on the network can answer faster than the router; its address it does not have."""
    world = World(Weather(delay_s=0.001))
    router = a_router("PCP")
    router.world = world
    forged = Router(world, EVERYTHING, address="192.168.7.66", outside="11.0.0.66")

    async def forge() -> None:
        """Answers to whatever the node asks, from another address."""
        socket = world.bind(("192.168.7.66", MAP_PORT))
        world.record = True
        seen = 0
        while True:
            await trio.sleep(0.0001)
            for target, datagram in world.log[seen:]:
                if target[0] == GATEWAY and target[1] == MAP_PORT:
                    for port in range(world.free_port() - 10, world.free_port()):
                        said = forged._answer_mapping(datagram, (OURS, port))
                        socket.send([said or b""], (OURS, port))
            seen = len(world.log)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(forge)
        async with at_home(router) as home:
            assert home.portmap.candidates() == BOTH
        nursery.cancel_scope.cancel()


async def test_a_flood_of_nonsense_ends_the_question_not_the_node(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(Weather(delay_s=0.001))
    router = Router(world, ())
    looked_at = 0

    def counted(data: bytes) -> Any:
        nonlocal looked_at
        looked_at += 1
        return parse_answer_untrusted(data)

    monkeypatch.setattr("discovery.nat_pmp.parse_answer_untrusted", counted)

    async def flood() -> None:
        socket = world.bind((GATEWAY, MAP_PORT))
        while True:
            for _, sender in await socket.receive():
                socket.send([b"\0" * 8] * 1000, sender)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flood)
        async with at_home(router) as home:
            assert home.portmap.candidates() == []
            assert 0 < looked_at <= MAX_DATAGRAMS
        nursery.cancel_scope.cancel()


async def test_a_pcp_answer_without_our_nonce_is_passed_over(autojump_clock: Clock) -> None:
    """Who can write the router's address on a packet still has not seen the question."""
    router = a_router("PCP")
    honest = router._answer_pcp

    def forged(question: bytes, sender: tuple[str, int]) -> bytes:
        answer = bytearray(honest(question, sender))
        if len(answer) > 24:
            answer[24] ^= 1
        return bytes(answer)

    router._answer_pcp = forged  # type: ignore[method-assign]
    async with at_home(router) as home:
        assert home.portmap.candidates() == []


async def test_a_bug_that_a_router_brings_to_light_leaves_the_node_running(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(_host: str) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr("discovery.portmap.uselessness", broken)
    router = a_router("PCP")
    async with at_home(router) as home:
        assert home.portmap.candidates() == []
        await trio.sleep(1)
        assert router.open == {}
        assert "ZeroDivisionError" in caplog.text


# --- where the router is -----------------------------------------------------------------------

PROC = """\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0107A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\tFE01A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
tun0\t00000000\t00000000\t0001\t0\t0\t50\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
short
"""
MAC = """\
   route to: default
destination: default
       mask: default
    gateway: 192.168.1.254
  interface: en0
"""
NETSTAT = """\
Internet:
Destination        Gateway            Flags        Netif Expire
default            link#12            UCSg         utun3
default            192.168.1.254      UGScg        en0
"""
WINDOWS = """\
Network Destination        Netmask          Gateway       Interface  Metric
          0.0.0.0          0.0.0.0    192.168.1.254    192.168.1.7     25
        127.0.0.0        255.0.0.0         On-link         127.0.0.1    331
"""


def test_the_default_route_with_the_lowest_metric_counts() -> None:
    assert parse_proc_route(PROC) == "192.168.1.254"
    assert parse_proc_route(PROC.splitlines()[0]) is None


@pytest.mark.parametrize("text", [MAC, NETSTAT, WINDOWS])
def test_other_systems_are_asked_in_their_own_words(text: str) -> None:
    assert parse_routes(text) == "192.168.1.254"


def test_no_route_is_none() -> None:
    assert parse_routes("route: writing to routing socket: not in table") is None


async def test_this_machine_has_a_router_or_none() -> None:
    found = await find_gateway()
    assert found is None or found.address != found.ours


async def test_the_survey_maps_nothing(
    autojump_clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = a_router()

    async def gateway() -> Gateway:
        return router.gateway()

    monkeypatch.setattr("discovery.portmap.find_gateway", gateway)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(router.world.run)
        nursery.start_soon(router.run)
        await trio.testing.wait_all_tasks_blocked()
        found = await survey(router.world.host(OURS))
        assert (found.router, found.by) == (GATEWAY, "PCP, NAT-PMP, UPnP")
        assert (router.entries, router.asked) == ({}, [])
        router.world.cut = True
        assert "switch on UPnP" in str((await survey(router.world.host(OURS))).problem)
        nursery.cancel_scope.cancel()
