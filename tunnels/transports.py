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
from tunnels.stun_port import StunPort
from tunnels.tcp_transport import TcpTransport
from tunnels.turn import IceServers
from tunnels.webrtc_transport import Swap, WebRtcTransport


@dataclass(frozen=True)
class Surroundings:
    """What a transport finds at the endpoint it works for.

    accept: called for each link that a stranger opens; it returns when the stranger has proven
    itself or is gone. connect, session: the endpoint's. budget: what all links of the node share
    (allowance.py). stun: None where there is no UDP. own_hosts: where peers may reach us.
    swap_with: see webrtc_transport.py. ice: servers that help WebRTC.
    """

    identity: Identity
    network: Network
    doors: Doors
    nursery: trio.Nursery
    accept: Accept
    budget: Budget
    stun: StunPort | None
    policy: AddressPolicy
    connect: Callable[[PeerId, Sequence[Candidate]], Awaitable[Session]]
    session: Callable[[PeerId], Session | None]
    own_hosts: Callable[[], list[str]]
    swap_with: Callable[[PeerId], Swap | None]
    ice: IceServers


@dataclass(frozen=True)
class TransportKind:
    """needs: the doors it cannot do without, of "udp", "tcp" and "tls". on_any_network: also on one
    made of memory."""

    make: Callable[[Surroundings], Transport]
    needs: frozenset[str]
    on_any_network: bool = True


def _quic(around: Surroundings) -> Transport:
    assert around.doors.datagrams is not None
    assert around.stun is not None
    return QuicTransport(
        around.identity,
        around.doors.datagrams,
        around.stun.knock,
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
        around.doors.second_listener,
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


def _webrtc(around: Surroundings) -> Transport:
    return WebRtcTransport(
        around.nursery,
        around.accept,
        around.budget,
        around.own_hosts,
        lambda: around.policy.at(around.doors.local[0], around.network.interface_addresses()),
        around.swap_with,
        around.ice,
    )


TRANSPORTS = {
    "tcp": TransportKind(_tcp, frozenset({"tcp", "tls"})),
    "quic": TransportKind(_quic, frozenset({"udp"})),
    "relay": TransportKind(_relay, frozenset({"tls"})),
    "webrtc": TransportKind(_webrtc, frozenset(), on_any_network=False),
}
"""By the names of `tunnels.link.LINK_KINDS`."""
