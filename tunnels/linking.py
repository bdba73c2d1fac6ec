"""How the links of an endpoint come about: dialled where a peer may be, or taken from a stranger.
Each is proven before it counts."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

import trio

from tunnels.dial import AddressPolicy
from tunnels.errors import TunnelError
from tunnels.kinds import Kinds
from tunnels.link import CloseCode, Introduction, Link, ProvenLink, Transport, prove
from tunnels.network import HostNetwork, Network
from tunnels.peer import Candidate, PeerId
from tunnels.session import Session
from tunnels.transports import TRANSPORTS, Surroundings
from tunnels.webrtc_transport import PLACELESS

ACCEPT_TIMEOUT_S = 5.0  # from a stranger's first datagram to its proof

log = logging.getLogger(__name__)


class Linking:
    """I own the transports of one endpoint while it runs.

    us: what we prove of ourselves. adopt: makes a stranger's proven link part of its session.
    is_relay: whether a peer was named as one.
    """

    def __init__(
        self,
        us: Introduction,
        kinds: Kinds,
        network: Network,
        policy: AddressPolicy,
        *,
        adopt: Callable[[ProvenLink], Session],
        is_relay: Callable[[PeerId], bool],
    ) -> None:
        self._us = us
        self._kinds = kinds
        self._network = network
        self._policy = policy
        self._adopt = adopt
        self._is_relay = is_relay
        self._bound_host = ""
        self.transports: dict[str, Transport] = {}

    @property
    def needs(self) -> frozenset[str]:
        """Of doors.py."""
        return frozenset().union(*(TRANSPORTS[kind].needs for kind in self._kinds.made))

    def start(self, around: Surroundings) -> None:
        self._bound_host = around.doors.local[0]
        for kind, made in TRANSPORTS.items():
            works_here = made.on_any_network or isinstance(self._network, HostNetwork)
            if kind in self._kinds.made and works_here:
                self.transports[kind] = transport = made.make(around)
                around.nursery.start_soon(transport.run)

    def stop(self) -> None:
        self.transports = {}

    def ports(self) -> dict[str, int]:
        """Where we listen, by kind of link."""
        return {
            kind: transport.port
            for kind, transport in self.transports.items()
            if transport.port is not None and kind in self._kinds.met_over
        }

    async def dial(self, peer: PeerId, candidate: Candidate) -> ProvenLink:
        """Raises TunnelError."""
        transport = self.transports.get(candidate.transport)
        allowed = candidate.transport in self._kinds.met_over
        if transport is None or not (allowed or self._is_relay(peer)):
            raise TunnelError(f"not tried: this node links over {self._kinds} only")
        refusal = None if candidate in PLACELESS else self.refusal(candidate.host)
        if refusal is not None:
            raise TunnelError(refusal)
        link = await transport.dial(candidate, peer)
        return await prove(link, self._us, expect=peer, entropy=secrets.token_bytes)

    def refusal(self, host: str) -> str | None:
        """Why an address that somebody named may not be contacted."""
        return self._policy.refusal(
            host,
            bound_host=self._bound_host,
            own_addresses=self._network.interface_addresses(),
        )

    async def accept(self, link: Link) -> None:
        """Hear a stranger out; its link becomes part of a session or is closed."""
        if link.kind not in self._kinds.met_over:
            link.close(CloseCode.REFUSED, "this node takes no links of this kind")
            return
        with trio.move_on_after(ACCEPT_TIMEOUT_S):
            try:
                proven = await prove(link, self._us, expect=None, entropy=secrets.token_bytes)
                self._adopt(proven)
            except TunnelError as error:
                log.debug("a link from %s was not accepted: %s", link.remote, error)
