"""Which interfaces carry multicast, and when they change."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import trio
import trio.testing

from tests.netlab.lan import LanHost, lan
from tunnels import interfaces as module
from tunnels.interfaces import (
    Interface,
    InterfaceWatch,
    interfaces,
    multicast_addresses,
    watch_interfaces,
)

ROOT = Path(__file__).parent.parent.parent
LOOPBACK = Interface("lo", 1, True, True, True, ("127.0.0.1", "::1"))
CABLE = Interface(
    "e0", 2, True, False, True, ("192.0.2.7", "192.0.2.8", "2001:db8::7", "fe80::7%e0")
)
UNPLUGGED = Interface("e1", 3, False, False, True, ("192.0.2.9",))
TUNNEL = Interface("wg0", 4, True, False, False, ("10.0.0.1",))
V6_ONLY = Interface("e2", 5, True, False, True, ("2001:db8::9",))


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> list[Interface]:
    """What this machine has, to be changed by the test."""
    found = [LOOPBACK, CABLE, UNPLUGGED, TUNNEL, V6_ONLY]
    monkeypatch.setattr(module, "interfaces", lambda: tuple(found))
    return found


def test_one_address_of_each_family_for_each_interface_that_carries_multicast(
    present: list[Interface],
) -> None:
    assert multicast_addresses() == {"192.0.2.7": 2, "fe80::7%e0": 2, "2001:db8::9": 5}


def test_where_one_address_is_listened_on_no_other_is_used(present: list[Interface]) -> None:
    assert multicast_addresses("192.0.2.8") == {"192.0.2.8": 2}
    assert multicast_addresses("198.51.100.1") == {}


async def test_without_netlink_a_change_is_looked_for(
    present: list[Interface], autojump_clock: trio.testing.MockClock
) -> None:
    watch = InterfaceWatch(None)
    with trio.move_on_after(60) as waited:
        await watch.wait_changed()
    assert waited.cancelled_caught, "nothing has changed"
    present.remove(CABLE)
    with trio.fail_after(module.POLL_S + 0.1):
        await watch.wait_changed()
    present.append(CABLE)
    present.remove(CABLE)
    with trio.move_on_after(60) as waited:
        await watch.wait_changed()
    assert waited.cancelled_caught, "told once"


async def test_a_change_between_two_waits_is_not_lost(
    present: list[Interface], autojump_clock: trio.testing.MockClock
) -> None:
    with watch_interfaces() as watch:
        present.remove(CABLE)
        with trio.fail_after(0.1):
            await watch.wait_changed()


async def test_where_netlink_is_refused_it_is_done_without(
    present: list[Interface],
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(socket, "socket", refused)
    with watch_interfaces() as watch:
        present.remove(CABLE)
        with trio.fail_after(module.POLL_S + 0.1):
            await watch.wait_changed()


async def test_a_machine_that_was_asleep_has_changed_its_network(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Whatever it looks like: what its peers and routers knew of it may be forgotten."""
    asleep_s = 100.0
    monkeypatch.setattr(module, "time_asleep_s", lambda: asleep_s)
    with watch_interfaces() as watch:
        asleep_s += 60
        with trio.fail_after(module.POLL_S + 0.1):
            await watch.wait_changed()
        asleep_s += module.ASLEEP_S / 2
        with trio.move_on_after(60) as waited:
            await watch.wait_changed()
        assert waited.cancelled_caught, "a little is a clock's error"


def test_an_interface_that_goes_while_it_is_looked_at_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(psutil, "net_if_stats", dict)
    assert interfaces() == ()


def python_in(host: LanHost, script: str) -> subprocess.Popen[str]:
    command = [*host.prefix, sys.executable, "-c", script]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)


WATCH = """
import trio
from tunnels.interfaces import multicast_addresses, watch_interfaces
async def main():
    with watch_interfaces() as watch:
        print("watching", flush=True)
        while True:
            await watch.wait_changed()
            print(sorted(one.partition("%")[0] for one in multicast_addresses()), flush=True)
trio.run(main)
"""


@pytest.mark.netlab
def test_the_kernel_tells_of_cables_and_addresses() -> None:
    with lan(1) as (host,), python_in(host, WATCH) as watching:
        try:
            assert watching.stdout is not None
            assert watching.stdout.readline() == "watching\n"
            host.add_address("10.78.0.99")
            host.ip("link", "set", "e0", "down")
            told = [watching.stdout.readline()]
            while told[-1] != "[]\n":
                told.append(watching.stdout.readline())
            host.ip("link", "set", "e0", "up")
            while "10.78.0.1" not in told[-1]:
                told.append(watching.stdout.readline())
            # The link-local address is left out while the kernel looks for doubles of it.
            while "fe80" not in told[-1]:
                assert "10.78.0.1" in told[-1]
                told.append(watching.stdout.readline())
            host.ip("route", "add", "default", "via", "10.78.0.2")
            assert watching.stdout.readline() == told[-1], "the same addresses, another way out"
        finally:
            watching.kill()
