"""What the rest of the package knows of the network below; tests implement it in memory."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import psutil

from tunnels.binding import Address
from tunnels.interfaces import watch_interfaces
from tunnels.tcp_socket import ByteSocket, Listener, connect, listen
from tunnels.udp import DatagramSocket, bind

FRESH_S = 0.1  # a look takes 0.3 ms, and ranking addresses asks of each

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface


class Network(Protocol):
    def bind(self, host: str | None, port: int) -> DatagramSocket:
        """Raises ListenFailed."""

    def listen(self, host: str | None, port: int) -> Listener:
        """Raises ListenFailed."""

    async def connect(self, to: Address) -> ByteSocket:
        """Raises LinkClosed with the reason."""

    async def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever our interfaces or their addresses have changed; until
        cancelled."""

    def interface_addresses(self) -> list[str]:
        """This machine's own addresses, loopback included, link-local left out."""

    def is_near(self, host: str) -> bool:
        """Whether `host` is in a network that one of our interfaces is in."""


class HostNetwork:
    """The network of this machine."""

    _known: list[Interface] = []  # noqa: RUF012 - replaced, never changed
    _known_until_s = -math.inf

    def bind(self, host: str | None, port: int) -> DatagramSocket:
        return bind(host, port)

    def listen(self, host: str | None, port: int) -> Listener:
        return listen(host, port)

    async def connect(self, to: Address) -> ByteSocket:
        return await connect(to)

    async def watch(self, changed: Callable[[], None]) -> None:
        with watch_interfaces() as interfaces:
            while True:
                await interfaces.wait_changed()
                self._known_until_s = -math.inf
                changed()

    def interface_addresses(self) -> list[str]:
        found: list[str] = []
        for interface in self._interfaces():
            address = str(interface.ip)
            if not interface.ip.is_link_local and address not in found:
                found.append(address)
        return found

    def is_near(self, host: str) -> bool:
        address = ipaddress.ip_address(host)
        return any(address in interface.network for interface in self._interfaces())

    def _interfaces(self) -> list[Interface]:
        """As last seen, when the system does not tell: it takes a descriptor to ask."""
        now = time.monotonic()
        if now >= self._known_until_s:
            with contextlib.suppress(OSError):
                self._known = _interfaces()
            self._known_until_s = now + FRESH_S
        return self._known


def _interfaces() -> list[Interface]:
    found: list[Interface] = []
    for addresses in psutil.net_if_addrs().values():
        for entry in addresses:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                address = entry.address.partition("%")[0]
                found.append(ipaddress.ip_interface(f"{address}/{_prefix_bits(entry.netmask)}"))
    return found


def _prefix_bits(netmask: str | None) -> int | str:
    """Of a netmask as the system tells it; of one that is missing, the address alone."""
    if not netmask:
        return ""
    mask = ipaddress.ip_address(netmask)
    return int(mask).bit_count()


def reachable_hosts(bound_host: str, own_addresses: Sequence[str]) -> list[str]:
    """Those of our addresses where a socket bound to `bound_host` can be reached by others."""
    bound = ipaddress.ip_address(bound_host)
    if not bound.is_unspecified:
        return [bound_host]
    found = [ipaddress.ip_address(text) for text in own_addresses]
    return [
        str(one)
        for one in found
        if not (one.is_loopback or one.is_link_local or one.is_multicast)
        and (one.version == 4 or bound.version == 6)
    ]
