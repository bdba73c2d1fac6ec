"""Bring back a session whose links have died or fallen silent.

A link that is only silent stays: where the network comes back, what answers first is kept, the old
link or a new one beside it. Every place where the peer may be is tried again and again, those
where it answered before several times a second: an outage ends at any moment.

Silence says nothing of the peer's process. That its machine is there and refuses the port on which
it listens does: it has ended (docs/decisions/0009-silence-is-not-death.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

import trio

from tunnels.errors import Refused, TunnelError
from tunnels.handshake import Role
from tunnels.link import CloseCode, ProvenLink
from tunnels.peer import Candidate, PeerId
from tunnels.session import Session

AGAIN_S = 0.3  # from one try to the next, where the peer answered before
LATER_S = 3.0  # where it never did
GIVE_UP_S = 7.5  # a try
# Between two dials of a peer through a relay that stood all the time: what those carry that make
# introductions alone is capped by the dial, and must not become a way by dial after dial.
RELAYED_AGAIN_S = 10.0
GONE_AFTER_S = 1.0  # of refusals, wherever it listened
# Of a relay's word that it is not there: it may be about to come back to a relay that restarted.
GONE_BY_RELAYS_AFTER_S = 15.0
MAX_PLACES = 16
MAX_KNOWN_PEERS = 1024

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SessionSilent:
    """Nothing is heard of the peer; streams wait."""

    session: Session

    @property
    def peer(self) -> PeerId:
        return self.session.peer


@dataclass(frozen=True)
class SessionBack:
    """It is heard again, `after_s` after its last word; streams go on."""

    session: Session
    after_s: float

    @property
    def peer(self) -> PeerId:
        return self.session.peer


class Redialler:
    """I watch sessions. While one is suspected, I try to reach its peer.

    attempt: a proven link over a candidate. adopt: make it part of the peer's session.
    """

    def __init__(
        self,
        attempt: Callable[[PeerId, Candidate], Awaitable[ProvenLink]],
        adopt: Callable[[ProvenLink], Session],
        tell: Callable[[SessionSilent | SessionBack], None],
    ) -> None:
        self._attempt = attempt
        self._adopt = adopt
        self._tell = tell
        self._known: dict[PeerId, tuple[Candidate, ...]] = {}
        self._reached: dict[PeerId, tuple[Candidate, ...]] = {}
        self._relayed: dict[PeerId, tuple[PeerId, float]] = {}  # through whom, and when
        self._relay_back = trio.Event()
        self._outages: set[_Outage] = set()
        self._news = trio.Event()
        self._network_changes = 0

    def learn(self, peer: PeerId, candidates: Iterable[Candidate]) -> None:
        """Where the peer says it may be reached now."""
        found = tuple(dict.fromkeys(candidates))[:MAX_PLACES]
        if found and set(found) != set(self._known.get(peer, ())):
            _remember(self._known, peer, found)
            self._stir()

    def reached(self, peer: PeerId, candidate: Candidate) -> None:
        """It answered there, with its key."""
        before = self._reached.get(peer, ())
        places = (candidate, *(one for one in before if one != candidate))
        _remember(self._reached, peer, places[: MAX_PLACES // 2])

    def network_changed(self, sessions: Iterable[Session]) -> None:
        """Ours: what failed may work now, and what stands may be cut."""
        for session in sessions:
            session.doubt()
        self._network_changes += 1
        self._stir()

    async def run(self, session: Session) -> None:
        """Until the session ends. A bug here ends the session, not the node."""
        try:
            self._is_back(session.peer)
            async with trio.open_nursery() as nursery:
                while not session.closed.is_set():
                    if session.suspected:
                        await self._bridge(session, nursery)
                    else:
                        await session.wait_links_changed()
                nursery.cancel_scope.cancel()
            self._relayed.pop(session.peer, None)
        except Exception:
            log.exception("dialling %s again failed", session.peer.short)
            session.end("internal error")

    async def _bridge(self, session: Session, nursery: trio.Nursery) -> None:
        """Until the peer is heard again, or the session has ended."""
        began_s = trio.current_time() - session.silence_s
        self._tell(SessionSilent(session))
        outage = _Outage(session, self._attempt_in_turn, self._adopt)
        self._outages.add(outage)
        nursery.start_soon(self._dial, outage)
        try:
            await session.wait_heard()
        finally:
            self._outages.discard(outage)
            outage.end()
        if not session.closed.is_set():
            self._is_back(session.peer)
            self._tell(SessionBack(session, trio.current_time() - began_s))

    async def _dial(self, outage: _Outage) -> None:
        async with trio.open_nursery() as nursery:
            while not outage.is_over:
                news, changes = self._news, self._network_changes
                for place in outage.add(
                    self._reached.get(outage.peer, ()), self._known.get(outage.peer, ())
                ):
                    nursery.start_soon(outage.try_place, place)
                await outage.until_over_or(news)
                # Not for a place that was learned: a dial through a relay learns the relay's, and
                # would cut itself short.
                if self._network_changes != changes:
                    outage.hurry()

    async def _attempt_in_turn(self, peer: PeerId, place: Candidate) -> ProvenLink:
        if place.via is None:
            return await self._attempt(peer, place)
        while (turn_s := self._turn_s(peer)) > trio.current_time():
            with trio.move_on_at(turn_s):
                await self._relay_back.wait()
        proven = await self._attempt(peer, place)
        self._relayed[peer] = (place.via, trio.current_time())
        return proven

    def _turn_s(self, peer: PeerId) -> float:
        """From when on it may be dialled through relays."""
        return self._relayed[peer][1] + RELAYED_AGAIN_S if peer in self._relayed else -math.inf

    def _is_back(self, relay: PeerId) -> None:
        """Whoever is sought through it is so at once, if it is one: what it carried died with it,
        or with the way to it. Dials under way go on: one of them may have brought it back."""
        for peer in [peer for peer, (via, _) in self._relayed.items() if via == relay]:
            del self._relayed[peer]
        self._relay_back.set()
        self._relay_back = trio.Event()
        for outage in self._outages:
            if outage.is_sought_through(relay):
                outage.wake()

    def _stir(self) -> None:
        self._news.set()
        self._news = trio.Event()


class _Outage:
    """One session's time without a word of its peer."""

    def __init__(
        self,
        session: Session,
        attempt: Callable[[PeerId, Candidate], Awaitable[ProvenLink]],
        adopt: Callable[[ProvenLink], Session],
    ) -> None:
        self.peer = session.peer
        self._session = session
        self._attempt = attempt
        self._adopt = adopt
        self._places: dict[Candidate, bool] = {}  # being tried; whether it answered there before
        self._own: set[Candidate] = set()  # where its process listens itself
        self._refused_since_s: dict[Candidate, float] = {}
        self._over = trio.Event()
        self._hurry = trio.Event()
        self._tries: set[trio.CancelScope] = set()

    def add(self, reached: Iterable[Candidate], known: Iterable[Candidate]) -> Iterator[Candidate]:
        """Those of these places that are new."""
        seen = self._session.remotes
        heard_from = [
            Candidate("quic", one.host, one.port, "reflexive") for one in seen if one.takes_dials
        ]
        reached = [*reached, *heard_from]
        hosts = {place.host for place in reached} | {one.host for one in seen}
        addresses = {_address(place) for place in self._places}
        for place in (*reached, *known):
            if _address(place) in addresses or len(self._places) >= MAX_PLACES:
                continue
            addresses.add(_address(place))
            self._places[place] = place in reached
            # A router's port, which is closed when the router forgets, is not its own; one that
            # somebody typed may be, and so may one of a kind that we do not know.
            is_straight = place.kind == "host" and place.host in hosts
            if self._places[place] if place.via else is_straight:
                self._own.add(place)
            yield place

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    def end(self) -> None:
        """Begin no further try. Those under way go on: the peer may have taken their link
        already, and given up its own for it."""
        self._over.set()
        self._hurry.set()

    async def until_over_or(self, news: trio.Event) -> None:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                await self._over.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            await news.wait()
            nursery.cancel_scope.cancel()

    def is_sought_through(self, relay: PeerId) -> bool:
        return any(place.via == relay for place in self._places)

    def wake(self) -> None:
        """Where a try has failed, begin the next now."""
        if not self.is_over:
            self._hurry.set()
            self._hurry = trio.Event()

    def hurry(self) -> None:
        """The network is another: begin each try anew, and now."""
        if not self.is_over:
            self.wake()
            for scope in self._tries:
                scope.cancel()

    async def try_place(self, place: Candidate) -> None:
        pause_s = AGAIN_S if self._places[place] else LATER_S
        while not self.is_over:
            began_s = trio.current_time()
            with trio.move_on_after(GIVE_UP_S) as scope:
                self._tries.add(scope)
                await self._try(place)
            self._tries.discard(scope)
            if scope.cancelled_caught:
                self._refused_since_s.pop(place, None)  # no answer is no refusal: they do not go on
            else:
                with trio.move_on_at(began_s + pause_s):
                    await self._hurry.wait()

    async def _try(self, place: Candidate) -> None:
        try:
            proven = await self._attempt(self.peer, place)
        except Refused:
            self._refused_since_s.setdefault(place, trio.current_time())
            self._judge(place)
        except TunnelError as error:
            self._refused_since_s.pop(place, None)
            log.debug("%s is not back at %s: %s", self.peer.short, place, error)
        else:
            self._take(proven)

    def _take(self, proven: ProvenLink) -> None:
        session = self._session
        # Not when the peer's own dial was faster: it may be giving that up for this one.
        heard = [link for link in session.standing if not session.is_silent(link)]
        if session.closed.is_set() or any(link.role is Role.DIALLER for link in heard):
            proven.link.close(CloseCode.LINK_OVER, "another link was faster")
            return
        try:
            self._adopt(proven)
        except TunnelError as error:
            log.debug("%s is back, and cannot be taken: %s", self.peer.short, error)

    def _judge(self, refused: Candidate) -> None:
        """End the session when its port is closed on every machine where it was heard."""
        now = trio.current_time()
        closed = {
            place.via or place.host
            for place, since_s in self._refused_since_s.items()
            if place in self._own
            and now - since_s >= (GONE_BY_RELAYS_AFTER_S if place.via else GONE_AFTER_S)
        }
        if closed and closed == {place.via or place.host for place in self._own}:
            self._session.end(f"its process has ended: nobody listens at {refused} any more")


def _address(place: Candidate) -> tuple[str, str, int, PeerId | None]:
    return place.transport, place.host, place.port, place.via


def _remember(
    table: dict[PeerId, tuple[Candidate, ...]], peer: PeerId, places: tuple[Candidate, ...]
) -> None:
    """As the newest of not too many."""
    table.pop(peer, None)
    table[peer] = places
    while len(table) > MAX_KNOWN_PEERS:
        del table[next(iter(table))]
