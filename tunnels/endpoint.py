"""A node's door: listens, accepts, dials, keeps one Session a peer."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from tunnels import webrtc_transport
from tunnels.allowance import Budget
from tunnels.binding import Address
from tunnels.changes import Change, SessionDown, SessionUp, Subscribers
from tunnels.credit import INITIAL_WINDOW_BYTES
from tunnels.dial import AddressPolicy, race, ranked
from tunnels.doors import Doors
from tunnels.epochs import Epochs
from tunnels.errors import LinkClosed, TunnelError
from tunnels.exchange import LIMITS as PATHS_LIMITS
from tunnels.exchange import SERVICE as PATHS
from tunnels.exchange import Exchange, Ourselves
from tunnels.gate import WORK, ServiceLimits
from tunnels.heartbeat import DEAD_S
from tunnels.identity import Identity
from tunnels.improve import Improver
from tunnels.link import LINK_KINDS, CloseCode, Introduction, Link, ProvenLink, Transport, prove
from tunnels.meeting import Meeting
from tunnels.network import HostNetwork, Network, reachable_hosts
from tunnels.outside import OutsideView
from tunnels.peer import Candidate, PeerId
from tunnels.punch import Puncher
from tunnels.quic import QuicLink
from tunnels.redial import Redialler
from tunnels.relay import RESERVE, Carries
from tunnels.relaying import OWN_RULES, Relaying
from tunnels.services import Services
from tunnels.session import Session, SessionSetup
from tunnels.stream import Handler, Stream
from tunnels.stun import Server
from tunnels.transports import TRANSPORTS, Surroundings, is_introduced, made_for
from tunnels.turn import IceServers
from tunnels.webrtc_transport import OVER_SESSION, Swap, WebRtcTransport

ACCEPT_TIMEOUT_S = 5.0  # from a stranger's first datagram to its proof
INTERNAL = frozenset({PATHS, RESERVE, webrtc_transport.SERVICE})
MAX_SESSIONS = 256
RESTARTED = "the peer has restarted"

log = logging.getLogger(__name__)


class Endpoint:
    """One identity on one port, of UDP and of TCP.

    authorize(peer, service): asked for every stream a peer opens to us.
    dead_after_s: how long a silent peer is kept, streams and all (it is suspected after 3 s).
    network: where the sockets live; tests pass one made of memory.
    transports: which kinds of links are made and taken, names of LINK_KINDS; to relays others too,
    where "relay" is the only one, and to begin WebRTC links: for is_introductory(service) alone.
    carries: what this node relays for its members.
    tcp_port: where TCP is listened on too, for networks that let nothing else out.
    stun: servers asked, beside our peers, how we look from outside; None: nobody is asked.
    ice: what else helps WebRTC.
    """

    def __init__(
        self,
        identity: Identity,
        *,
        authorize: Callable[[PeerId, str], bool],
        policy: AddressPolicy = AddressPolicy(),  # noqa: B008 - frozen
        dead_after_s: float = DEAD_S,
        network: Network | None = None,
        transports: Collection[str] = tuple(LINK_KINDS),
        stun: Collection[Server] | None = None,
        carries: Carries = Carries.INTRODUCTIONS,
        ice: IceServers = IceServers(),  # noqa: B008 - frozen
        is_introductory: Callable[[str], bool] = lambda service: service in INTERNAL,
        tcp_port: int | None = None,
    ) -> None:
        if not transports or not set(transports) <= set(LINK_KINDS):
            raise ValueError(f"links are of these kinds: {', '.join(LINK_KINDS)}")
        self.identity = identity
        self.peer = identity.peer
        self._policy = policy
        self._dead_after_s = dead_after_s
        self._tcp_port = tcp_port
        self._network = network or HostNetwork()
        self._epochs = Epochs()
        self._us = Introduction(identity, self._epochs.of, INITIAL_WINDOW_BYTES)
        self._services = Services(authorize)
        self._is_member = lambda peer: authorize(peer, RESERVE)
        self._sessions: dict[PeerId, Session] = {}
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._subscribers = Subscribers()
        self._kinds = frozenset(transports)
        introduced = is_introduced(self._kinds)
        self._meets_over = made_for(self._kinds) if introduced else self._kinds
        self._carriers = self._kinds if introduced else frozenset(LINK_KINDS)
        self._ice = replace(ice, stun=tuple((one.host, one.port) for one in stun or ()))
        self._is_introductory = is_introductory
        self._doors: Doors | None = None
        self.candidates_changed = trio.Event()  # another one after each change
        tell, seen = self.tell_candidates_changed, self._direct_addresses
        self.outside = OutsideView(self._network, stun, seen, policy, tell)
        self.nats = self.outside.nats
        self._further: list[Callable[[], Iterable[Candidate]]] = [self.outside.candidates]
        self._transports: dict[str, Transport] = {}
        self._nursery: trio.Nursery | None = None
        self._improver = Improver(
            *(self._network.is_near, self._attempt, self._adopt, self._sessions.get),
            kinds=self._carriers & made_for(self._kinds),
        )
        self._improver.exchange = Exchange(self._ourselves, self._improver.follow)
        self._redialler = Redialler(self._attempt, self._adopt, self._subscribers.tell)
        self._stopped = False
        self.serve(PATHS, self._improver.exchange.serve, PATHS_LIMITS)
        self.relaying = Relaying(
            self.peer,
            carries,
            is_member=self._is_member,
            session=self.session,
        )
        self.serve(webrtc_transport.SERVICE, self._describe, webrtc_transport.LIMITS)

    # --- running ------------------------------------------------------------------------

    async def run(
        self,
        host: str | None,
        port: int,
        *,
        task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen and serve until cancelled; the started value is the bound port.

        host None: every interface, v4 and v6. Raises ListenFailed before it has started.
        On the way out every peer is told goodbye.
        """
        if self._nursery is not None:
            raise RuntimeError("this endpoint runs already")
        doors = Doors(self._network, self.identity, host, port, self._needs(), self._tcp_port)
        self._stopped = False
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._start_transports(nursery, doors)
                task_status.started(doors.local[1])
                try:
                    await trio.sleep_forever()
                finally:
                    self._stopped = True
                    # The last first: the goodbye of a relayed one goes over that with the relay.
                    for session in reversed(list(self._sessions.values())):
                        session.end("the node is stopping")
        finally:
            doors.close()
            self._subscribers.close()
            self._nursery = None
            self._doors = None
            self.relaying.stop()
            self._transports = {}

    def _needs(self) -> frozenset[str]:
        return frozenset().union(*(TRANSPORTS[kind].needs for kind in made_for(self._kinds)))

    def _start_transports(self, nursery: trio.Nursery, doors: Doors) -> None:
        around = Surroundings(
            identity=self.identity,
            network=self._network,
            doors=doors,
            nursery=nursery,
            accept=self._accept,
            budget=Budget(trio.current_time()),
            policy=self._policy,
            connect=self.connect,
            session=self.session,
            own_hosts=lambda: self._network_hosts(doors),
            swap_with=self._swap_with,
            ice=self._ice,
        )
        self._doors = doors
        for kind, made in TRANSPORTS.items():
            works_here = made.on_any_network or isinstance(self._network, HostNetwork)
            if kind in made_for(self._kinds) and works_here:
                self._transports[kind] = transport = made.make(around)
                nursery.start_soon(transport.run)
        self.relaying.start(self._transports.values(), self.serve)
        if doors.datagrams is not None:
            nursery.start_soon(doors.datagrams.run)
            host = doors.local[0]
            puncher = Puncher(doors.datagrams, lambda: self._network.bind(host, 0), self._refusal)
            self._improver.punch = puncher.punch
        nursery.start_soon(self.outside.run, doors.datagrams)
        nursery.start_soon(self._network.watch, self._network_changed)

    def _network_changed(self) -> None:
        self._redialler.network_changed(self._sessions.values())
        self._improver.look_again()
        self.outside.check_now()
        self.tell_candidates_changed()

    def serve(self, service: str, handler: Handler, limits: ServiceLimits = WORK) -> None:
        """Hand streams opened to `service` to `handler`, which owns each until it returns.

        An exact name, or a prefix ending in "/": "rpc/" takes rpc/<lease>. The longest wins.
        limits: how many streams, and how often (gate.py); beyond, they are refused.
        """
        self._services.serve(service, handler, limits)

    def candidates(self) -> list[Candidate]:
        """Where peers may reach us: through relays; at our interface addresses with the bound
        ports, for each address over every kind of link; at what others know (`add_candidates`).
        Each place once."""
        doors = self._open_doors()
        found = [
            Candidate(kind, one, port, "host")
            for one in self._network_hosts(doors)
            for kind, port in self.bound_ports().items()
        ]
        if doors.second_listener is not None and "tcp" in self._kinds:
            second = doors.second_listener.local[1]
            found += [Candidate("tcp", one, second) for one in self._network_hosts(doors)]
        for source in self._further:
            found += (one for one in source() if one.transport in self._meets_over)
        places: dict[tuple[str, str, int, PeerId | None], Candidate] = {}
        for one in (*self.relaying.candidates(found), *found):
            places.setdefault((one.transport, one.host, one.port, one.via), one)
        return list(places.values())

    def add_candidates(self, source: Callable[[], Iterable[Candidate]]) -> None:
        """`source` knows of further places where peers may reach us, as seen from elsewhere; asked
        whenever our candidates are. Those over links that this node does not take are left out."""
        self._further.append(source)

    async def punch(self, meeting: Meeting) -> tuple[str, int]:
        """Send to somebody while they send to us, so that the NATs between let both through. Where
        they are heard; `connect` with that as a candidate is next, on the dialler's side. Raises
        TunnelError."""
        self._still_running()
        if self._improver.punch is None:
            raise TunnelError("this node sends no datagrams (--transport): nothing can be punched")
        return await self._improver.punch(meeting)

    def tell_candidates_changed(self) -> None:
        """For whoever added some."""
        self.candidates_changed.set()
        self.candidates_changed = trio.Event()

    def _direct_addresses(self) -> list[Address]:
        """Of members that answer over UDP: what a stranger says of us, nobody vouches for."""
        members = filter(self._is_member, self._sessions)
        return [address for peer in members if (address := self._seen(peer)) is not None]

    def meeting_places(self) -> list[Candidate]:
        """Our candidates, and what helps those alone who punch: where a hard NAT was seen."""
        return [*self.candidates(), *self.outside.guesses()]

    def _ourselves(self) -> Ourselves:
        return Ourselves(self.meeting_places(), self.nats())

    def _seen(self, peer: PeerId) -> tuple[str, int] | None:
        """Where its datagrams come from; None where they do not come straight."""
        session = self._sessions.get(peer)
        best = session.best_link if session else None
        return best.address if isinstance(best, QuicLink) else None

    def bound_ports(self) -> dict[str, int]:
        """Where we listen, by kind of link."""
        return {
            kind: transport.port
            for kind, transport in self._transports.items()
            if transport.port is not None and kind in self._meets_over
        }

    def _network_hosts(self, doors: Doors) -> list[str]:
        return reachable_hosts(doors.local[0], self._network.interface_addresses())

    # --- sessions -----------------------------------------------------------------------

    def session(self, peer: PeerId) -> Session | None:
        return self._sessions.get(peer)

    def sessions(self) -> list[Session]:
        return list(self._sessions.values())

    def subscribe(self) -> trio.MemoryReceiveChannel[Change]:
        """Events from now on, until the endpoint stops. A subscriber that leaves
        MAX_UNREAD_EVENTS unread is cut off."""
        return self._subscribers.add()

    async def connect(self, peer: PeerId, candidates: Sequence[Candidate]) -> Session:
        """The session with `peer`: the one that stands, or a new one over the first candidate
        that answers with the peer's key; from then on better ones are looked for. A session whose
        peer has gone silent gets a new link, or gives way when the peer turns out to have
        restarted. Raises DialFailed.
        """
        nursery = self._still_running()
        if peer == self.peer:
            raise TunnelError("this is the node's own id; connect to another node")
        candidates = self.relaying.gather(peer, candidates)
        self._redialler.learn(peer, candidates)
        async with self._dialling_alone(peer):
            session = self._sessions.get(peer)
            if session is not None and not session.suspected:
                self._improver.look_after(session, candidates, nursery)
                return session
            proven = await race(
                peer,
                ranked(candidates, self._network.is_near),
                lambda one: self._attempt(peer, one),
                _close_late_link,
            )
            session = self._adopt(proven)
            self._improver.look_after(session, candidates, nursery)
            return session

    @asynccontextmanager
    async def _dialling_alone(self, peer: PeerId) -> AsyncIterator[None]:
        lock = self._dialling.setdefault(peer, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():  # else it is another's by now
                self._dialling.pop(peer, None)

    def learn(self, peer: PeerId, candidates: Sequence[Candidate]) -> None:
        """Where the peer may be reached now, should its links die: whoever dialled."""
        self._redialler.learn(peer, candidates)

    async def _attempt(self, peer: PeerId, candidate: Candidate) -> ProvenLink:
        self._still_running()
        transport = self._transports.get(candidate.transport)
        allowed = candidate.transport in self._meets_over
        if transport is None or not (allowed or self.relaying.is_relay(peer)):
            known = ", ".join(one for one in LINK_KINDS if one in self._kinds)
            raise TunnelError(f"not tried: this node links over {known} only")
        refusal = None if candidate == OVER_SESSION else self._refusal(candidate.host)
        if refusal is not None:
            raise TunnelError(refusal)
        link = await transport.dial(candidate, peer)
        proven = await prove(link, self._us, expect=peer, entropy=secrets.token_bytes)
        if candidate != OVER_SESSION:
            self._redialler.reached(peer, candidate)
        return proven

    def _refusal(self, host: str) -> str | None:
        """Why an address that somebody named may not be contacted."""
        return self._policy.refusal(
            host,
            bound_host=self._open_doors().local[0],
            own_addresses=self._network.interface_addresses(),
        )

    def _opens_before(self, service: str) -> bool:
        """What streams over links that only introduce are for."""
        internal = service in INTERNAL or service.startswith(tuple(OWN_RULES))
        return internal or self._is_introductory(service)

    def _swap_with(self, peer: PeerId) -> Swap | None:
        session = self._sessions.get(peer)
        return None if session is None else partial(webrtc_transport.swap_over, session)

    async def _describe(self, stream: Stream) -> None:
        """A peer wants a WebRTC link."""
        transport = self._transports.get("webrtc")
        if isinstance(transport, WebRtcTransport):
            await transport.serve(stream)
        else:
            stream.reset("this node makes no WebRTC links")

    async def _accept(self, link: Link) -> None:
        """Hear a stranger out; its link becomes part of a session or is closed."""
        if link.kind not in self._meets_over:
            link.close(CloseCode.REFUSED, "this node takes no links of this kind")
            return
        with trio.move_on_after(ACCEPT_TIMEOUT_S):
            try:
                proven = await prove(link, self._us, expect=None, entropy=secrets.token_bytes)
                self._adopt(proven)
            except TunnelError as error:
                log.debug("a link from %s was not accepted: %s", link.remote, error)

    def _adopt(self, proven: ProvenLink) -> Session:
        """The session this proven link belongs to, made when there is none."""
        if proven.own_epoch != self._epochs.of(proven.peer):
            proven.link.close(CloseCode.LINK_OVER, "the session that it was made for is over")
            raise LinkClosed("the session that this link was made for is over; connect again")
        proven.link.trusted = True
        session = self._sessions.get(proven.peer)
        if session is not None and session.epoch != proven.proven.epoch:
            session.end(RESTARTED)
            session = None
        if session is None:
            if len(self._sessions) >= MAX_SESSIONS:
                proven.link.close(CloseCode.REFUSED, "too many peers are connected here")
                raise LinkClosed("too many peers are connected to this node; stop some first")
            session = self._sessions[proven.peer] = Session(
                proven,
                SessionSetup(
                    answer=self._services.answer,
                    nursery=self._still_running(),
                    on_end=self._session_ended,
                    me=self.peer,
                    dead_after_s=self._dead_after_s,
                    kinds=self._carriers,
                    is_introductory=self._opens_before,
                ),
            )
            session.add_link(proven)
            self._subscribers.tell(SessionUp(session))
            self._still_running().start_soon(self._redialler.run, session)
        else:
            session.add_link(proven)
        return session

    def _session_ended(self, session: Session) -> None:
        if session.close_reason != RESTARTED:
            # Of this it may never hear, and would come back to a session that is no more.
            self._epochs.renew(session.peer)
        if self._sessions.get(session.peer) is session:
            del self._sessions[session.peer]
            self._subscribers.tell(SessionDown(session, session.close_reason or ""))

    def _running(self) -> trio.Nursery:
        if self._nursery is None:
            raise RuntimeError("the endpoint does not run: start Endpoint.run first")
        return self._nursery

    def _open_doors(self) -> Doors:
        self._running()
        assert self._doors is not None
        return self._doors

    def _still_running(self) -> trio.Nursery:
        """Raises LinkClosed once it has stopped: a dial under way may be answered then."""
        if self._stopped:
            raise LinkClosed("this node has stopped")
        return self._running()


def _close_late_link(proven: ProvenLink) -> None:
    proven.link.close(CloseCode.LINK_OVER, "another address was faster")
