"""Names of STUN servers: looked up now and then, without holding anybody up."""

from __future__ import annotations

import errno
import socket as sockets
from typing import Any

import pytest
import trio
import trio.testing

from tests.lab.outside import B6, STUN_PORT, A, B, C, lab
from tunnels import outside
from tunnels.binding import Address
from tunnels.outside import CHECK_S, resolve
from tunnels.peer import NatKind
from tunnels.stun import Server


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


async def test_two_names_of_one_server_are_asked_once(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with lab() as world:
        world.add_server(A)
        world.names = {name: [(A, STUN_PORT)] for name in ("one.example", "other.example")}
        view, _ = world.view("easy", ["one.example", "other.example"])
        await view.checked.wait()
        assert world.asked_at(A) == 1


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
