"""A node's door: listens, accepts, dials, keeps one Session a peer."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import trio

from tunnels import webrtc_transport
from tunnels.allowance import Budget
from tunnels.binding import Address
from tunnels.changes import Change, Subscribers
from tunnels.credit import INITIAL_WINDOW_BYTES
from tunnels.dial import AddressPolicy, race, ranked
from tunnels.doors import Doors
from tunnels.errors import LinkClosed, TunnelError
from tunnels.exchange import LIMITS as PATHS_LIMITS
from tunnels.exchange import SERVICE as PATHS
from tunnels.exchange import Exchange, Ourselves
from tunnels.gate import WORK, ServiceLimits
from tunnels.heartbeat import DEAD_S
from tunnels.identity import Identity
from tunnels.improve import Improver
from tunnels.kinds import Kinds
from tunnels.link import LINK_KINDS, CloseCode, Introduction, ProvenLink
from tunnels.linking import Linking
from tunnels.meeting import Meeting
from tunnels.network import HostNetwork, Network
from tunnels.outside import OutsideView
from tunnels.own_candidates import OwnCandidates
from tunnels.peer import Candidate, PeerId
from tunnels.punch import Puncher
from tunnels.quic import QuicLink
from tunnels.redial import Redialler
from tunnels.relay import RESERVE, Carries
from tunnels.relaying import OWN_RULES, Relaying
from tunnels.services import Services
from tunnels.session import Session, SessionSetup
from tunnels.sessions import Sessions
from tunnels.stream import Handler, Stream
from tunnels.stun import Server
from tunnels.stun_port import StunPort
from tunnels.transports import Surroundings
from tunnels.turn import IceServers
from tunnels.webrtc_transport import PLACELESS, Swap, WebRtcTransport

INTERNAL = frozenset({PATHS, RESERVE, webrtc_transport.SERVICE})


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
        self.identity = identity
        self.peer = identity.peer
        self._policy = policy
        self._dead_after_s = dead_after_s
        self._tcp_port = tcp_port
        self._network = network or HostNetwork()
        self._kinds = kinds = Kinds(transports)
        self._ice = replace(ice, stun=tuple((one.host, one.port) for one in stun or ()))
        self._is_introductory = is_introductory
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._doors: Doors | None = None
        self._nursery: trio.Nursery | None = None
        self._stopped = False
        self._services = Services(authorize)
        self._is_member: Callable[[PeerId], bool] = lambda peer: authorize(peer, RESERVE)
        self._subscribers = Subscribers()
        tell = self._subscribers.tell
        self._sessions = Sessions(self._session_setup, lambda one: self._redialler.run(one), tell)
        self.relaying = Relaying(
            self.peer, carries, is_member=self._is_member, session=self.session
        )
        self._own = OwnCandidates(self._network, kinds, self.relaying.candidates)
        seen, told = self._direct_addresses, self._own.tell_changed
        self.outside = OutsideView(self._network, stun, seen, policy, told)
        self.nats = self.outside.nats
        self._own.add(self.outside.candidates)
        us = Introduction(identity, self._sessions.epochs.of, INITIAL_WINDOW_BYTES)
        adopt = self._sessions.adopt
        self._linking = Linking(
            us, kinds, self._network, policy, adopt=adopt, is_relay=self.relaying.is_relay
        )
        self._redialler = Redialler(self._attempt, adopt, tell)
        self._improver = Improver(
            *(self._network.is_near, self._attempt, adopt, self._sessions.get),
            kinds=kinds.carriers & kinds.made,
        )
        self._improver.exchange = Exchange(self._ourselves, self._improver.follow)
        self.serve(PATHS, self._improver.exchange.serve, PATHS_LIMITS)
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
        doors = Doors(self._network, self.identity, host, port, self._linking.needs, self._tcp_port)
        self._stopped = False
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._start(nursery, doors)
                task_status.started(doors.local[1])
                try:
                    await trio.sleep_forever()
                finally:
                    self._stopped = True
                    # The last first: the goodbye of a relayed one goes over that with the relay.
                    for session in reversed(list(self._sessions)):
                        session.end("the node is stopping")
        finally:
            doors.close()
            self._subscribers.close()
            self._nursery = None
            self._doors = None
            self.relaying.stop()
            self._linking.stop()

    def _start(self, nursery: trio.Nursery, doors: Doors) -> None:
        stun = None if doors.datagrams is None else StunPort(doors.datagrams)
        around = Surroundings(
            identity=self.identity,
            network=self._network,
            doors=doors,
            nursery=nursery,
            accept=self._linking.accept,
            budget=Budget(trio.current_time()),
            stun=stun,
            policy=self._policy,
            connect=self.connect,
            session=self.session,
            own_hosts=lambda: self._own.hosts(doors),
            swap_with=self._swap_with,
            ice=self._ice,
        )
        self._doors = doors
        self._linking.start(around)
        self.relaying.start(self._linking.transports.values(), self.serve)
        if doors.datagrams is not None:
            nursery.start_soon(doors.datagrams.run)
            host, refusal = doors.local[0], self._linking.refusal
            puncher = Puncher(doors.datagrams, lambda: self._network.bind(host, 0), refusal)
            self._improver.punch = puncher.punch
        if stun is not None:
            nursery.start_soon(stun.run)
        nursery.start_soon(self.outside.run, stun)
        nursery.start_soon(self._network.watch, self._network_changed)

    def _network_changed(self) -> None:
        self._redialler.network_changed(self._sessions)
        self._improver.look_again()
        self.outside.check_now()
        self.tell_candidates_changed()

    def serve(self, service: str, handler: Handler, limits: ServiceLimits = WORK) -> None:
        """Hand streams opened to `service` to `handler`, which owns each until it returns.

        An exact name, or a prefix ending in "/": "rpc/" takes rpc/<lease>. The longest wins.
        limits: how many streams, and how often (gate.py); beyond, they are refused.
        """
        self._services.serve(service, handler, limits)

    # --- where we are -------------------------------------------------------------------

    def candidates(self) -> list[Candidate]:
        """Where peers may reach us: through relays; at our interface addresses with the bound
        ports, for each address over every kind of link; at what others know (`add_candidates`).
        Each place once."""
        return self._own.gather(self._open_doors(), self.bound_ports())

    def add_candidates(self, source: Callable[[], Iterable[Candidate]]) -> None:
        """`source` knows of further places where peers may reach us, as seen from elsewhere; asked
        whenever our candidates are. Those over links that this node does not take are left out."""
        self._own.add(source)

    async def punch(self, meeting: Meeting) -> tuple[str, int]:
        """Send to somebody while they send to us, so that the NATs between let both through. Where
        they are heard; `connect` with that as a candidate is next, on the dialler's side. Raises
        TunnelError."""
        self._still_running()
        if self._improver.punch is None:
            raise TunnelError("this node sends no datagrams (--transport): nothing can be punched")
        return await self._improver.punch(meeting)

    @property
    def webrtc(self) -> WebRtcTransport | None:
        """None where it makes no such links, or does not run."""
        transport = self._linking.transports.get("webrtc")
        return transport if isinstance(transport, WebRtcTransport) else None

    def tell_candidates_changed(self) -> None:
        """For whoever added some."""
        self._own.tell_changed()

    @property
    def candidates_changed(self) -> trio.Event:
        """Another one after each change."""
        return self._own.changed

    def _direct_addresses(self) -> list[Address]:
        """Of members that answer over UDP: what a stranger says of us, nobody vouches for."""
        members = (one for one in self._sessions if self._is_member(one.peer))
        return [address for one in members if (address := _seen(one)) is not None]

    def meeting_places(self) -> list[Candidate]:
        """Our candidates, and what helps those alone who punch: where a hard NAT was seen."""
        return [*self.candidates(), *self.outside.guesses()]

    def _ourselves(self) -> Ourselves:
        return Ourselves(self.meeting_places(), self.nats())

    def bound_ports(self) -> dict[str, int]:
        """Where we listen, by kind of link."""
        return self._linking.ports()

    # --- sessions -----------------------------------------------------------------------

    def session(self, peer: PeerId) -> Session | None:
        return self._sessions.get(peer)

    def sessions(self) -> list[Session]:
        return list(self._sessions)

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
            session = self._sessions.adopt(proven)
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
        proven = await self._linking.dial(peer, candidate)
        if candidate not in PLACELESS:
            self._redialler.reached(peer, candidate)
        return proven

    def _opens_before(self, service: str) -> bool:
        """What streams over links that only introduce are for."""
        internal = service in INTERNAL or service.startswith(tuple(OWN_RULES))
        return internal or self._is_introductory(service)

    def _swap_with(self, peer: PeerId) -> Swap | None:
        session = self._sessions.get(peer)
        return None if session is None else partial(webrtc_transport.swap_over, session)

    async def _describe(self, stream: Stream) -> None:
        """A peer wants a WebRTC link."""
        if self.webrtc is not None:
            await self.webrtc.serve(stream)
        else:
            stream.reset("this node makes no WebRTC links")

    def _session_setup(self) -> SessionSetup:
        return SessionSetup(
            answer=self._services.answer,
            nursery=self._still_running(),
            on_end=self._sessions.ended,
            me=self.peer,
            dead_after_s=self._dead_after_s,
            kinds=self._kinds.carriers,
            is_introductory=self._opens_before,
        )

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


def _seen(session: Session) -> Address | None:
    """Where the peer's datagrams come from; None where they do not come straight."""
    best = session.best_link
    return best.address if isinstance(best, QuicLink) else None
