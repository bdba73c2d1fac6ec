"""ICE of one WebRTC link, by aioice: which addresses it uses, and which of the peer's it believes.

Lives on the asyncio island; imported when the first link is made, since aiortc is heavy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import aioice
from aioice.ice import StunProtocol, TransportPolicy
from aioice.stun import Class, Message, Method, TransactionError
from aioice.turn import TurnClientMixin

from tunnels.binding import Address
from tunnels.handshake import Role
from tunnels.turn import IceServers
from tunnels.webrtc_description import Credentials, Description, Place, PlaceKind

GATHER_S = 2.0  # for STUN and TURN servers to answer; what has not is left out
REBIND_S = 200  # a TURN server forgets after 300 (RFC 8656 section 9); aioice asks after 500
MAX_QUEUED = 1024  # datagrams that DTLS has not looked at
MAX_REMOTE = 32  # addresses of the peer, those it was seen at included
_KINDS = {"host": PlaceKind.HOST, "srflx": PlaceKind.REFLEXIVE, "relay": PlaceKind.RELAYED}
_TYPES = {kind: name for name, kind in _KINDS.items()}

log = logging.getLogger(__name__)


class IceConnection(aioice.Connection):
    """may_contact(host): the address policy's word on an address of the peer's."""

    def __init__(
        self,
        role: Role,
        credentials: Credentials,
        hosts: list[str],
        servers: IceServers,
        may_contact: Callable[[str], bool],
    ) -> None:
        turn = servers.turn
        super().__init__(
            ice_controlling=role is Role.DIALLER,
            stun_server=servers.stun[0] if servers.stun else None,
            turn_server=None if turn is None else (turn.host, turn.port),
            turn_username=None if turn is None else turn.user,
            turn_password=None if turn is None else turn.password,
            turn_ssl=turn is not None and turn.transport == "tls",
            turn_transport="udp" if turn is None or turn.transport == "udp" else "tcp",
            transport_policy=TransportPolicy.RELAY if servers.relay_only else TransportPolicy.ALL,
            local_username=credentials.fragment,
            local_password=credentials.password,
        )
        self._hosts = [] if servers.relay_only else hosts
        self._may_contact = may_contact
        self.is_deaf: Callable[[], bool] = lambda: False
        self.on_early_check: Callable[[], object] = lambda: None
        self.bytes_in = 0
        self.bytes_out = 0

    async def gather_candidates(self) -> None:
        """aioice's own takes every interface and waits 5 s for a server that does not answer."""
        self._local_candidates_start = True
        self._local_candidates += await self.get_component_candidates(
            component=1,
            addresses=self._hosts,
            timeout=GATHER_S,  # type: ignore[arg-type]
        )
        self._local_candidates_end = True
        for turn in filter(None, map(_turn_of, self._protocols)):
            turn.channel_refresh_time = REBIND_S

    def places(self) -> tuple[Place, ...]:
        """Ours, best first."""
        found = sorted(self.local_candidates, key=lambda one: -one.priority)
        return tuple(Place(_KINDS[one.type], one.host, one.port, one.priority) for one in found)

    async def meet(self, them: Description) -> None:
        """Raises ConnectionError when no pair of addresses works."""
        self.remote_username = them.credentials.fragment
        self.remote_password = them.credentials.password
        for number, place in enumerate(them.places):
            if self._may_contact(place.host):
                await self.add_remote_candidate(
                    aioice.Candidate(
                        foundation=str(number),
                        component=1,
                        transport="udp",
                        priority=place.priority,
                        host=place.host,
                        port=place.port,
                        type=_TYPES[place.kind],
                    )
                )
        await self.connect()

    async def let_in(self, addresses: Iterable[Address]) -> None:
        """Have our TURN server take what comes from these hosts, whatever its port, for another
        300 s (RFC 8656 section 9); and keep open what is between the server and us. A host gets
        a datagram of 20 bytes the first time, that is all."""
        for turn in filter(None, map(_turn_of, self._protocols)):
            for address in addresses:
                try:
                    channel = turn.peer_to_channel.get(address)
                    if channel is None:
                        indication = Message(Method.BINDING, Class.INDICATION)
                        await turn.send_data(bytes(indication), address)
                    else:
                        await turn.channel_bind(channel, address)
                except (TransactionError, ConnectionError) as error:
                    log.debug("the TURN server lets %s not in: %s", address[0], error)

    async def send(self, data: bytes) -> None:
        """aioice's own, without two coroutines on the way."""
        pair = self._nominated.get(1)
        if pair is None:
            raise ConnectionError("not connected")
        self.bytes_out += len(data)
        pair.protocol.transport.sendto(data, pair.remote_addr)

    @property
    def path(self) -> tuple[str, int, bool] | None:
        """The peer's address in use, and whether traffic goes through a TURN server of either."""
        pair = self._nominated.get(1)
        if pair is None:
            return None
        relayed = "relay" in (pair.local_candidate.type, pair.remote_candidate.type)
        host, port = pair.remote_addr
        return host, port, relayed

    @property
    def has_waiting(self) -> bool:
        return not self._queue.empty()

    # --- called by aioice ---------------------------------------------------------------

    def data_received(self, data: bytes, component: int) -> None:
        if self._queue.qsize() < MAX_QUEUED and not self.is_deaf():
            self.bytes_in += len(data)
            super().data_received(data, component)

    def request_received(
        self, message: Message, addr: tuple[str, int], protocol: StunProtocol
    ) -> None:
        known = any(one.port == addr[1] and one.host == addr[0] for one in self._remote_candidates)
        if known or (len(self._remote_candidates) < MAX_REMOTE and self._may_contact(addr[0])):
            super().request_received(message, addr, protocol)
            if self._early_checks:  # of those who know our password, before we `meet` them
                self.on_early_check()


def _turn_of(protocol: StunProtocol) -> TurnClientMixin | None:
    """aioice's client of the TURN server through which it sends, if it does. aioice keeps it to
    itself, and refreshes what it has asked of the server only when something is sent."""
    return getattr(protocol.transport, "_TurnTransport__inner_protocol", None)
