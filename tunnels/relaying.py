"""What an endpoint has to do with relays: it carries for others, and is reached through others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from tunnels.errors import TunnelError
from tunnels.gate import ServiceLimits
from tunnels.link import Transport
from tunnels.peer import Candidate, PeerId
from tunnels.relay import JOINING, KIND, RELAY, RELAYED, RESERVE, RESERVING, Carries, Relay
from tunnels.relay_transport import ARRIVING, RelayTransport, Reservation
from tunnels.session import Session
from tunnels.stream import Handler

OWN_RULES = frozenset({RELAY, RELAYED})
"""Services that decide by themselves who is served: `authorize` is not asked."""


class Relaying:
    """I belong to one endpoint.

    is_member: whether a peer may reserve here. session: the present one with a peer.
    """

    def __init__(
        self,
        me: PeerId,
        carries: Carries,
        *,
        is_member: Callable[[PeerId], bool],
        session: Callable[[PeerId], Session | None],
    ) -> None:
        self._me = me
        self._carries = carries
        self._is_member = is_member
        self._session = session
        self._transport: RelayTransport | None = None
        self.relay: Relay | None = None  # while the endpoint runs

    def start(
        self,
        transports: Collection[Transport],
        serve: Callable[[str, Handler, ServiceLimits], None],
    ) -> None:
        """transports: of the endpoint, which may have none for links through relays."""
        ours = [one for one in transports if isinstance(one, RelayTransport)]
        self._transport = ours[0] if ours else None
        if self._transport is not None:
            serve(RELAYED, self._transport.arrive, ARRIVING)
        self.relay = Relay(is_member=self._is_member, session=self._session, carries=self._carries)
        serve(RESERVE, self.relay.reserve, RESERVING)
        serve(RELAY, self.relay.join, JOINING)

    def stop(self) -> None:
        self._transport = self.relay = None

    # --- reaching others ----------------------------------------------------------------

    def gather(self, peer: PeerId, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
        """Of those that lead to `peer` through the same relay, one for all."""
        return candidates if self._transport is None else self._transport.gather(peer, candidates)

    def is_relay(self, peer: PeerId) -> bool:
        """Whether the peer was named as one: it is linked to by any kind of link."""
        return self._transport is not None and self._transport.is_relay(peer)

    # --- being reached ------------------------------------------------------------------

    async def reserve(
        self,
        session: Session,
        places: Iterable[Candidate],
        agreed: Callable[[Reservation], None] = lambda _: None,
    ) -> None:
        """Be reachable through the peer of `session`, which answers at `places`, until either ends
        that. agreed: called once it has agreed. Raises TunnelError."""
        if self._transport is None:
            raise TunnelError("this node links over no relay (--transport)")
        await self._transport.hold(session, places, agreed)

    def reservations(self) -> list[Reservation]:
        """Where we are reachable."""
        return [] if self._transport is None else self._transport.reservations()

    def candidates(self, direct: Sequence[Candidate]) -> list[Candidate]:
        """What is to be told beside our `direct` ones. A relay says of itself that it is one by a
        way to itself through itself; and it may be reached over TCP wherever it is over UDP: a
        cloud that translates its address lets in what its owner has opened."""
        found = [] if self._transport is None else self._transport.candidates()
        if self._carries is Carries.TRAFFIC and direct:
            found.append(replace(direct[0], transport=KIND, via=self._me))
            ports = {one.port for one in direct if one.transport == "tcp" and one.kind == "host"}
            seen = {one.host for one in direct if one.kind == "reflexive"}
            found += [
                Candidate("tcp", host, port, "reflexive")
                for host in sorted(seen)
                for port in sorted(ports)
            ]
        return found


def relays_for_others(candidates: Iterable[Candidate], peer: PeerId) -> bool:
    """Whether these, which `peer` listed, say that it is a relay."""
    return any(one.via == peer for one in candidates)
