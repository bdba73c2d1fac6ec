"""Sockets of this machine, UDP's and TCP's alike: bound, or with a sentence why not."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import sys

from tunnels.errors import LinkClosed, ListenFailed, Refused
from tunnels.peer import format_address

Address = tuple[str, int]  # an IP literal without zone, v4 never in mapped form; port

REFUSED = "refused: no node listens on that port"
PRIVILEGED_BELOW = 1024

MAX_KNOWN = 1024
_NAMES = {socket.SOCK_DGRAM: "UDP", socket.SOCK_STREAM: "TCP"}


def bound_socket(host: str | None, port: int, kind: socket.SocketKind) -> socket.socket:
    """host None: every interface, v4 and v6. Raises ListenFailed."""
    if host is None:
        with contextlib.suppress(_NoIPv6):
            return _dual_stack_socket(port, kind)
        host = "0.0.0.0"  # noqa: S104 - every interface is what None asks for
    try:
        version = ipaddress.ip_address(host).version
    except ValueError as error:
        raise ListenFailed(f"cannot listen on {host!r}: give an IP address") from error
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    sock = None
    try:
        sock = _fresh(family, kind)
        sock.bind((host, port))
    except OSError as error:
        if sock is not None:
            sock.close()
        raise _listen_failed(host, port, kind, error) from error
    return sock


class _NoIPv6(Exception):
    pass


def _dual_stack_socket(port: int, kind: socket.SocketKind) -> socket.socket:
    try:
        sock = _fresh(socket.AF_INET6, kind)
    except OSError as error:
        raise _NoIPv6 from error
    try:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", port))
    except OSError as error:
        sock.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise _listen_failed("::", port, kind, error) from error
        raise _NoIPv6 from error
    return sock


def _fresh(family: socket.AddressFamily, kind: socket.SocketKind) -> socket.socket:
    sock = socket.socket(family, kind)
    if kind is socket.SOCK_STREAM and sys.platform != "win32":
        # else a restarted node waits a minute for its port
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


def _listen_failed(host: str, port: int, kind: socket.SocketKind, error: OSError) -> ListenFailed:
    where = f"{_NAMES[kind]} {format_address(host, port)}"
    if error.errno == errno.EADDRINUSE:
        return ListenFailed(
            f"cannot listen on {where}: the port is in use; choose another, or 0 for any"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return ListenFailed(
            f"cannot listen on {where}: this machine has no such address; choose one of its own"
        )
    if error.errno == errno.EACCES and port < PRIVILEGED_BELOW:
        return ListenFailed(
            f"cannot listen on {where}: ports below {PRIVILEGED_BELOW} are root's; choose another, "
            f"or allow it (as root: sysctl net.ipv4.ip_unprivileged_port_start={port})"
        )
    return ListenFailed(f"cannot listen on {where}: {reason_of(error.errno)}")


def reason_of(code: int | None) -> str:
    """Why an address cannot be reached or used."""
    if code == errno.ECONNREFUSED:
        return REFUSED
    if code == errno.EINVAL:
        return "it cannot be reached from the address this node listens on"
    return os.strerror(code or 0).lower()


def unreached(code: int | None) -> LinkClosed:
    """What a dial that failed with this error number raises."""
    kind = Refused if code == errno.ECONNREFUSED else LinkClosed
    return kind(reason_of(code))


def plain_host(host: str) -> str:
    """An address as the kernel tells it, without zone and not in mapped form."""
    if host.startswith("::ffff:") and "." in host:
        return host[7:]
    return host.partition("%")[0]


class KnownAddresses:
    """Where a peer answered before, the last of them: such an address may be tried more often than
    one that somebody names."""

    def __init__(self) -> None:
        self._known: dict[Address, None] = {}

    def add(self, address: Address) -> None:
        self._known.pop(address, None)
        self._known[address] = None
        while len(self._known) > MAX_KNOWN:
            del self._known[next(iter(self._known))]

    def __contains__(self, address: Address) -> bool:
        return address in self._known
