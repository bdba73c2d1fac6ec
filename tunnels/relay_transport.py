"""The relay link: a tcp link whose connections are streams of sessions with a relay (relay.py).

On one side it dials candidates that name a relay, on the other it holds reservations, and takes
what the relays where it has one bring. Over the session with the relay, whatever carries it, goes
the tcp link's own protocol, in TLS with the key that is sought: a relay that alters, drops, repeats
or reorders bytes ends the link, no more. The dialler then does without this way to this peer for a
while, ever longer; other peers may still be reached through it, since the peer may be the culprit.
"""

from __future__ import annotations

import logging
import ssl
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import trio

from tunnels.allowance import Budget, Rate
from tunnels.binding import Address
from tunnels.errors import LinkClosed, Refused, TunnelError
from tunnels.gate import ServiceLimits
from tunnels.identity import Identity
from tunnels.link import Accept, CloseCode
from tunnels.network import Network
from tunnels.peer import Candidate, PeerId, parse_peer_id_untrusted
from tunnels.relay import (
    KIND,
    NOT_HERE,
    RELAY,
    RELAYED,
    RESERVE,
    Carries,
    is_relayed,
    parse_carries_untrusted,
)
from tunnels.relay_socket import RelayedSocket
from tunnels.relay_suspicions import Suspicions
from tunnels.session import Session
from tunnels.stream import Stream
from tunnels.tcp import TcpLink
from tunnels.tcp_connection import Connection
from tunnels.tcp_socket import ByteSocket
from tunnels.tcp_transport import TcpTransport, Way

LEGS = ("tcp", "quic")  # kinds of links to a relay
MAX_PLACES = 3  # of a relay, that we list as ways to us
MAX_KNOWN = 64  # relays whose places are remembered
AGREES_WITHIN_S = 5.0
MAX_ARRIVALS = 64  # joined to us and not yet looked at

ARRIVING = ServiceLimits(
    peer_streams=100, streams=1000, peer_rate=Rate(20, 256), rate=Rate(100, 1024)
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reservation:
    """At this relay peers may be joined to us."""

    relay: PeerId
    places: tuple[Candidate, ...]
    carries: Carries


class RelayedLink(TcpLink):
    kind = KIND

    @property
    def socket(self) -> RelayedSocket:
        socket = self._connection.socket
        assert isinstance(socket, RelayedSocket)
        return socket

    @property
    def remote(self) -> str:
        return f"{self.socket.relay.short} ({self.socket.way})"

    @property
    def was_altered(self) -> bool:
        """The relay did something to what it carried, or the peer, which had proven itself, wants
        us to think so."""
        if not self.trusted or self.closure is None:
            return False
        return self._connection.tls.broken or self.closure.code is CloseCode.PROTOCOL_ERROR

    def _forget(self, connection: Connection) -> None:
        super()._forget(connection)
        if connection.tls.broken:
            self.close(CloseCode.PROTOCOL_ERROR, "what came through the relay was altered")


class RelayTransport(TcpTransport):
    """connect: the session with a relay that answers at these candidates. session: the present one
    with a peer."""

    link_class = RelayedLink

    def __init__(
        self,
        identity: Identity,
        network: Network,
        nursery: trio.Nursery,
        accept: Accept,
        tls: ssl.SSLContext,
        budget: Budget,
        *,
        connect: Callable[[PeerId, Sequence[Candidate]], Awaitable[Session]],
        session: Callable[[PeerId], Session | None],
    ) -> None:
        self._arrivals = _Arrivals()
        super().__init__(identity, network, nursery, accept, self._arrivals, tls, budget)
        self._us = identity.peer
        self._connect = connect
        self._session = session
        self._places: OrderedDict[PeerId, tuple[Candidate, ...]] = OrderedDict()
        self._held: dict[PeerId, Reservation] = {}
        self._suspicions = Suspicions()

    @property
    def port(self) -> None:  # type: ignore[override]
        """Peers find us at our relays."""

    # --- dialling -----------------------------------------------------------------------

    def gather(self, peer: PeerId, candidates: Iterable[Candidate]) -> list[Candidate]:
        """The first of those that lead through the same relay stands for all of them. What leads
        through ourselves is left out, and by what the peer says that it is a relay itself."""
        kept: list[Candidate] = []
        through: dict[PeerId, list[Candidate]] = {}
        for one in candidates:
            if one.via is None or one.transport != KIND:
                kept.append(one)
                continue
            if one.via not in through and one.via not in (peer, self._us):
                kept.append(one)
            through.setdefault(one.via, []).append(one)
        for relay, places in through.items():
            self._places[relay] = tuple(places)
            self._places.move_to_end(relay)
        while len(self._places) > MAX_KNOWN:
            self._places.popitem(last=False)
        return kept

    def is_relay(self, peer: PeerId) -> bool:
        """Whether it was named as one."""
        return peer in self._places

    async def dial(self, candidate: Candidate, expect: PeerId) -> TcpLink:
        relay = candidate.via
        if relay is None:
            raise LinkClosed("not tried: no relay is named")
        self._suspicions.check(relay, expect, trio.current_time())
        places = (candidate, *self._places.get(relay, ()))
        way = Way(
            partial(self._reach, relay, expect, places), partial(self._suspect, relay, expect)
        )
        share = self._budget.share((KIND, relay))
        try:
            return await self._dial_link(way, expect, share)
        except LinkClosed as error:
            if NOT_HERE in str(error):
                raise Refused(str(error)) from error
            raise

    async def _reach(
        self, relay: PeerId, expect: PeerId, places: Sequence[Candidate]
    ) -> ByteSocket:
        """A connection to be. Raises LinkClosed."""
        legs = [replace(one, transport=leg, via=None) for one in places for leg in LEGS]
        try:
            session = await self._connect(relay, legs)
            if is_relayed(session):
                raise LinkClosed("the relay itself is reached through a relay")
            stream = await session.open(f"{RELAY}{expect}")
        except LinkClosed:
            raise
        except TunnelError as error:
            raise LinkClosed(str(error)) from error
        return RelayedSocket(stream, expect, session.stats.remote or "")

    def _suspect(self, relay: PeerId, peer: PeerId) -> None:
        """What came through the relay was not what the peer sent."""
        if self._suspicions.add(relay, peer, trio.current_time()):
            log.warning(
                "what comes from %s through the relay %s is not what was sent: this way is not "
                "used for a while; more of the kind is not told",
                peer.short,
                relay.short,
            )

    def _is_near(self, host: str) -> bool:  # noqa: ARG002
        return False

    async def _run_link(self, link: TcpLink) -> None:
        await super()._run_link(link)
        if isinstance(link, RelayedLink) and link.was_altered:
            self._suspect(link.socket.relay, link.socket.peer)

    # --- being reached ------------------------------------------------------------------

    async def hold(
        self,
        session: Session,
        places: Iterable[Candidate],
        agreed: Callable[[Reservation], None],
    ) -> None:
        """Be reachable through the other end of `session`, which answers at `places`, until it ends
        that or is gone. agreed: called once it has agreed. Raises TunnelError."""
        relay = session.peer
        if is_relayed(session):
            raise TunnelError("the relay itself is reached through a relay")
        async with await session.open(RESERVE) as stream:
            try:
                with trio.fail_after(AGREES_WITHIN_S):
                    carries = parse_carries_untrusted(await stream.receive_some(1))
            except trio.TooSlowError:
                raise TunnelError("it does not say whether it carries anything") from None
            ways = [replace(one, transport=KIND, via=relay) for one in places]
            held = Reservation(relay, tuple(dict.fromkeys(ways))[:MAX_PLACES], carries)
            self._held[relay] = held
            agreed(held)
            try:
                while await stream.receive_some():
                    pass
            finally:
                if self._held.get(relay) is held:
                    del self._held[relay]

    def reservations(self) -> list[Reservation]:
        """Those that carry more than introductions first."""
        return sorted(self._held.values(), key=lambda one: one.carries.value)

    def candidates(self) -> list[Candidate]:
        return [place for held in self.reservations() for place in held.places]

    async def arrive(self, stream: Stream) -> None:
        """The service `relayed/`: a relay joins somebody to us."""
        relay = stream.peer
        if relay not in self._held:
            stream.reset("this node did not ask to be reached through a relay there")
            return
        peer = parse_peer_id_untrusted(stream.service.removeprefix(RELAYED))
        session = self._session(relay)
        way = "" if session is None else session.stats.remote
        socket = RelayedSocket(stream, peer, way or "")
        if not self._arrivals.put(socket):
            stream.reset("too many are joined to this node at once; try again later")
            return
        await socket.closed.wait()


class _Arrivals:
    """What relays join to us: a tcp_socket.Listener."""

    local: Address = ("", 0)

    def __init__(self) -> None:
        self._waiting: deque[ByteSocket] = deque()
        self._acceptors = trio.lowlevel.ParkingLot()
        self._closed = False

    def put(self, socket: ByteSocket) -> bool:
        if len(self._waiting) >= MAX_ARRIVALS or self._closed:
            return False
        self._waiting.append(socket)
        self._acceptors.unpark_all()
        return True

    async def accept(self) -> ByteSocket:
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            if self._closed:
                raise trio.ClosedResourceError
            await self._acceptors.park()
        return self._waiting.popleft()

    def close(self) -> None:
        self._closed = True
        self._acceptors.unpark_all()


def relay_of(session: Session) -> PeerId | None:
    """Whoever carries the session; None where it goes straight."""
    link = session.best_link
    return link.socket.relay if isinstance(link, RelayedLink) else None
