"""This machine's network interfaces: which of them carry multicast, and when the network changes.

That is: interfaces, their addresses, the default routes; and that the machine was asleep, since
nobody knows what happened to its paths meanwhile. Linux tells of changes on a netlink socket
(rtnetlink(7)); elsewhere, and for sleep, they are looked for every `POLL_S`. A change is told when
what is there differs from what was seen before, never because somebody said so.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import trio

SETTLE_S = 0.2  # an interface that comes up says so in several messages
POLL_S = 5.0
ASLEEP_S = 2.0  # a clock that was stepped to and fro by a little does not count
_MESSAGES_BYTES = 64 * 1024
_RTMGRP_LINK = 0x1
_RTMGRP_IPV4_IFADDR = 0x10
_RTMGRP_IPV4_ROUTE = 0x40
_RTMGRP_IPV6_IFADDR = 0x100
_RTMGRP_IPV6_ROUTE = 0x400
_GROUPS = (
    _RTMGRP_LINK
    | _RTMGRP_IPV4_IFADDR
    | _RTMGRP_IPV4_ROUTE
    | _RTMGRP_IPV6_IFADDR
    | _RTMGRP_IPV6_ROUTE
)
_ROUTES_V4, _ROUTES_V6 = Path("/proc/net/route"), Path("/proc/net/ipv6_route")
_IFA_F_TENTATIVE = 0x40


@dataclass(frozen=True)
class Interface:
    """One interface as it is now. index: the system's number for it, new when it is made anew."""

    name: str
    index: int
    is_up: bool
    is_loopback: bool
    has_multicast: bool
    addresses: tuple[str, ...]  # literals; a link-local IPv6 one has its zone


def interfaces() -> tuple[Interface, ...]:
    """All interfaces of this machine, by name."""
    stats = psutil.net_if_stats()
    numbers = {name: index for index, name in socket.if_nameindex()}
    unready = _tentative()
    found = []
    for name, entries in sorted(psutil.net_if_addrs().items()):
        if name not in stats:
            continue
        flags = set(stats[name].flags.split(","))
        addresses = tuple(
            entry.address
            for entry in entries
            if entry.family in (socket.AF_INET, socket.AF_INET6)
            and (name, entry.address.partition("%")[0]) not in unready
        )
        found.append(
            Interface(
                name=name,
                index=numbers.get(name, 0),
                # Windows shows no flags.
                is_up=stats[name].isup and (flags == {""} or "running" in flags),
                is_loopback="loopback" in flags or any(map(_is_loopback, addresses)),
                has_multicast=flags == {""} or "multicast" in flags,
                addresses=addresses,
            )
        )
    return tuple(found)


def _tentative() -> set[tuple[str, str]]:
    """IPv6 addresses that are still being checked for doubles (RFC 4862), by interface: nothing can
    be bound to them yet. Known on Linux only."""
    found = set()
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text(encoding="ascii").splitlines():
            digits, _, _, _, flags, name = line.split()
            if int(flags, 16) & _IFA_F_TENTATIVE:
                found.add((name, str(ipaddress.IPv6Address(int(digits, 16)))))
    return found


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def multicast_addresses(only_host: str | None = None) -> dict[str, int]:
    """By which of our addresses multicast leaves, with their interface's number: for each interface
    one of IPv4 and one of IPv6, which is link-local where it can be. only_host: no other address.
    """
    found: dict[str, int] = {}
    for interface in interfaces():
        if not interface.is_up or interface.is_loopback or not interface.has_multicast:
            continue
        usable = [one for one in interface.addresses if only_host in (None, one.partition("%")[0])]
        v4 = [one for one in usable if ":" not in one]
        v6 = sorted((one for one in usable if ":" in one), key=lambda one: not _is_link_local(one))
        for address in (*v4[:1], *v6[:1]):
            found[address] = interface.index
    return found


def _is_link_local(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_link_local


def default_routes() -> frozenset[tuple[str, ...]]:
    """The ways out of this machine, as Linux tells them (proc_pid_net(5)); nothing elsewhere."""
    return frozenset((*_default_routes_v4(), *_default_routes_v6()))


def _default_routes_v4() -> Iterator[tuple[str, ...]]:
    """Interface, gateway, metric."""
    with contextlib.suppress(OSError):
        for line in _ROUTES_V4.read_text(encoding="ascii").splitlines()[1:]:
            words = line.split()
            if words[1] == words[7] == "00000000":
                yield words[0], words[2], words[6]


def _default_routes_v6() -> Iterator[tuple[str, ...]]:
    """Interface, gateway, metric."""
    with contextlib.suppress(OSError):
        for line in _ROUTES_V6.read_text(encoding="ascii").splitlines():
            words = line.split()
            if not words[0].strip("0") and words[1] == "00" and words[9] != "lo":
                yield words[9], words[4], words[5]


def time_asleep_s() -> float:
    """How long this machine has been asleep since it was started; 0 where that is not known."""
    if not hasattr(time, "CLOCK_BOOTTIME"):
        return 0.0
    awake_s = time.clock_gettime(time.CLOCK_MONOTONIC)
    return time.clock_gettime(time.CLOCK_BOOTTIME) - awake_s


class InterfaceWatch:
    """I tell when this machine's network has changed."""

    def __init__(self, netlink: socket.socket | None) -> None:
        self._netlink = netlink
        self._seen = interfaces(), default_routes()
        self._asleep_s = time_asleep_s()

    async def wait_changed(self) -> None:
        """Returns once it differs from what it was at the last return, or at the start."""
        while (now := (interfaces(), default_routes())) == self._seen and not self._has_slept():
            await self._wait_hint()
        self._seen = now
        self._asleep_s = time_asleep_s()

    def _has_slept(self) -> bool:
        return time_asleep_s() - self._asleep_s >= ASLEEP_S

    async def _wait_hint(self) -> None:
        if self._netlink is None:
            await trio.sleep(POLL_S)
            return
        while not self._has_slept():
            with trio.move_on_after(POLL_S):
                await trio.lowlevel.wait_readable(self._netlink)
                break
        else:
            return
        await trio.sleep(SETTLE_S)
        # Ends when all is read, or when there was more than the socket held.
        with contextlib.suppress(OSError):
            while True:
                self._netlink.recv(_MESSAGES_BYTES)


@contextmanager
def watch_interfaces() -> Iterator[InterfaceWatch]:
    """A watch that stands while the block lasts."""
    netlink = _netlink_socket()
    try:
        yield InterfaceWatch(netlink)
    finally:
        if netlink is not None:
            netlink.close()


def _netlink_socket() -> socket.socket | None:
    """None where the system has no such thing, or keeps it to itself."""
    if sys.platform != "linux":
        return None
    try:
        netlink = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    except OSError:
        return None
    try:
        netlink.bind((0, _GROUPS))
    except OSError:
        netlink.close()
        return None
    netlink.setblocking(False)
    return netlink
