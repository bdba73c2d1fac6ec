"""The table of transports: what makes each kind of link. A new kind adds its line here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import trio

from tunnels.allowance import Budget
from tunnels.dial import AddressPolicy
from tunnels.doors import Doors
from tunnels.identity import Identity
from tunnels.link import Accept, Transport
from tunnels.network import Network
from tunnels.peer import Candidate, PeerId
from tunnels.quic_transport import QuicTransport
from tunnels.relay_transport import RelayTransport
from tunnels.session import Session
from tunnels.tcp_transport import TcpTransport


@dataclass(frozen=True)
class Surroundings:
    """What a transport finds at the endpoint it works for.

    accept: called for each link that a stranger opens; it returns when the stranger has proven
    itself or is gone. connect, session: the endpoint's. budget: what all links of the node share
    (allowance.py).
    """

    identity: Identity
    network: Network
    doors: Doors
    nursery: trio.Nursery
    accept: Accept
    budget: Budget
    policy: AddressPolicy
    connect: Callable[[PeerId, Sequence[Candidate]], Awaitable[Session]]
    session: Callable[[PeerId], Session | None]


@dataclass(frozen=True)
class TransportKind:
    """needs: the doors it cannot do without, of "udp", "tcp" and "tls"."""

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


def _relay(around: Surroundings) -> Transport:
    assert around.doors.tls is not None
    return RelayTransport(
        around.identity,
        around.network,
        around.nursery,
        around.accept,
        around.doors.tls,
        around.budget,
        connect=around.connect,
        session=around.session,
    )


TRANSPORTS = {
    "tcp": TransportKind(_tcp, frozenset({"tcp", "tls"})),
    "quic": TransportKind(_quic, frozenset({"udp"})),
    "relay": TransportKind(_relay, frozenset({"tls"})),
}
"""By the names of `tunnels.link.LINK_KINDS`."""

LEGS = frozenset({"tcp", "quic"})
"""What may lead to a relay."""


def made_for(kinds: frozenset[str]) -> frozenset[str]:
    """The transports of a node that links to its peers over these kinds: a relay has to be reached
    somehow."""
    return kinds if kinds & LEGS or "relay" not in kinds else kinds | LEGS
