"""Routers, and who answers in their place, that lie, flood or never end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from discovery.mappers import MAX_DATAGRAMS
from discovery.nat_pmp import parse_answer_untrusted
from discovery.portmap import describe
from tests.discovery.routers import GATEWAY, OURS, description, http_answer, ssdp_answer
from tests.lab.datagrams import Weather, World
from tests.lab.home_network import BOTH, Clock, Home, a_router, at_home
from tests.lab.routers import EVERYTHING, MAP_PORT, SSDP_PORT, WEB_PORT, Router


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
