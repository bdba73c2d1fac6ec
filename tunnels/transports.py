"""The table of transports: what makes each kind of link. A new kind adds its line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import trio

from tunnels.allowance import Budget
from tunnels.dial import AddressPolicy
from tunnels.doors import Doors
from tunnels.identity import Identity
from tunnels.link import Accept, Transport
from tunnels.network import Network
from tunnels.quic_transport import QuicTransport
from tunnels.tcp_transport import TcpTransport


@dataclass(frozen=True)
class Surroundings:
    """What a transport finds at the endpoint it works for.

    accept: called for each link that a stranger opens; it returns when the stranger has proven
    itself or is gone. budget: what all links of the node share (allowance.py).
    """

    identity: Identity
    network: Network
    doors: Doors
    nursery: trio.Nursery
    accept: Accept
    budget: Budget
    policy: AddressPolicy


@dataclass(frozen=True)
class TransportKind:
    """needs: the doors it cannot do without, of "udp" and "tcp"."""

    make: Callable[[Surroundings], Transport]
    needs: frozenset[str]


def _quic(around: Surroundings) -> Transport:
    assert around.doors.datagrams is not None
    return QuicTransport(
        around.identity,
        around.doors.datagrams,
        around.nursery,
        around.accept,
        around.network.interface_addresses,
        around.budget,
    )


def _tcp(around: Surroundings) -> Transport:
    assert around.doors.listener is not None
    assert around.doors.tls is not None
    return TcpTransport(
        around.identity,
        around.network,
        around.nursery,
        around.accept,
        around.doors.listener,
        around.doors.tls,
        around.budget,
    )


TRANSPORTS = {
    "tcp": TransportKind(_tcp, frozenset({"tcp"})),
    "quic": TransportKind(_quic, frozenset({"udp"})),
}
"""By the names of `tunnels.link.LINK_KINDS`."""
