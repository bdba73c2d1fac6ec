"""Start on the first link that works, and go on looking for a better one.

What is tried: what is known of the peer's addresses; meanwhile, where no link is straight yet,
offers are swapped over the session (exchange.py), the TCP addresses of the other's offer are
dialled by both, and both punch (punch.py) for a way of datagrams, over which the side that asked
dials QUIC. To an address that somebody else named, no more than small probes go before it answers.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Sequence

import trio

from tunnels.dial import race, rank_of, ranked
from tunnels.errors import TunnelError
from tunnels.exchange import Exchange, Swap
from tunnels.handshake import Role
from tunnels.link import LINK_KINDS, CloseCode, ProvenLink
from tunnels.meeting import Meeting, Nats, Punch
from tunnels.offers import Want
from tunnels.peer import Candidate, PeerId
from tunnels.session import Session
from tunnels.webrtc_transport import OVER_SESSION

FIRST_PAUSE_S = 1.0  # after a session has begun, or its links have changed
FIRST_PAUSE_INDIRECT_S = 0.1  # while its bytes go through somebody else: that is felt
LAST_PAUSE_S = 60.0
PAUSE_GROWTH = 3.0
DIRECT_RANK = max(LINK_KINDS[kind].rank for kind in ("quic", "tcp"))
"""Links of a higher one lead through somebody else."""

log = logging.getLogger(__name__)


class Improver:
    """I try, now and then, whether a peer can be reached by a better link than its session has.

    attempt: a proven link over a candidate. adopt: make it part of the peer's session, which then
    moves its streams over. exchange: of offers; None where none are swapped. punch: None where
    there is no UDP.
    """

    def __init__(
        self,
        is_near: Callable[[str], bool],
        attempt: Callable[[PeerId, Candidate], Awaitable[ProvenLink]],
        adopt: Callable[[ProvenLink], Session],
        session: Callable[[PeerId], Session | None],
        kinds: Collection[str] = tuple(LINK_KINDS),
    ) -> None:
        self._kinds = kinds
        self.exchange: Exchange | None = None
        self.punch: Punch | None = None
        self._is_near = is_near
        self._attempt = attempt
        self._adopt = adopt
        self._session = session
        self._candidates: dict[Session, tuple[Candidate, ...]] = {}
        self._offered: dict[Session, Sequence[Candidate]] = {}  # by the last swap
        self._look_now = trio.lowlevel.ParkingLot()

    def look_after(
        self, session: Session, candidates: Sequence[Candidate], nursery: trio.Nursery
    ) -> None:
        """Until the session ends. candidates: what is known of the peer's addresses by now."""
        if session.closed.is_set():
            return
        is_new = session not in self._candidates
        self._candidates[session] = tuple(candidates)
        if is_new:
            nursery.start_soon(self._run, session)

    def look_again(self) -> None:
        """Our own network has changed: what failed before may work now."""
        self._look_now.unpark_all()

    async def _run(self, session: Session) -> None:
        try:
            pause_s = self._first_pause_s(session)
            while not session.closed.is_set():
                if await self._something_happens(session, pause_s):
                    pause_s = self._first_pause_s(session)
                    continue
                await self._try(session)
                pause_s = min(PAUSE_GROWTH * pause_s, LAST_PAUSE_S)
        finally:
            del self._candidates[session]
            self._offered.pop(session, None)

    def _first_pause_s(self, session: Session) -> float:
        is_straight = session.rank is None or session.rank <= DIRECT_RANK
        return FIRST_PAUSE_S if is_straight else FIRST_PAUSE_INDIRECT_S

    async def _something_happens(self, session: Session, within_s: float) -> bool:
        happened = False

        async def wait(until: Callable[[], Awaitable[None]]) -> None:
            nonlocal happened
            await until()
            happened = True
            nursery.cancel_scope.cancel()

        with trio.move_on_after(within_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait, session.wait_links_changed)
                nursery.start_soon(wait, self._look_now.park)
        return happened

    async def _try(self, session: Session) -> None:
        """While bytes go through somebody else, the first two at once: an address that nobody
        answers at takes seconds to be given up."""
        offered = self._offered.get(session, ())
        known = self._better(session, [*self._candidates[session], *offered])
        async with trio.open_nursery() as nursery:

            async def go(way: Callable[[], Awaitable[None]]) -> None:
                await way()
                if not _is_indirect(session):
                    nursery.cancel_scope.cancel()

            nursery.start_soon(go, lambda: self._dial(session, known))
            if _is_indirect(session):
                nursery.start_soon(go, lambda: self._try_offers(session))
        await self._dial(session, self._better(session, [OVER_SESSION]))

    async def _try_offers(self, session: Session) -> None:
        if self.exchange is None or session.suspected:
            return
        try:
            swap = await self.exchange.ask(session, self._wants())
        except TunnelError as error:
            log.debug("%s swaps no offers: %s", session.peer.short, error)
            return
        self._offered[session] = _by_tcp(swap)
        await self.follow(swap)

    def _wants(self) -> Want:
        return Want.PUNCH if "quic" in self._kinds else Want.NOTHING

    async def follow(self, swap: Swap) -> None:
        """Try what both have offered, at the same time as the other side does."""
        session = self._session(swap.peer)
        if session is None:
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._dial, session, self._better(session, _by_tcp(swap)))
            if self.punch is not None and swap.theirs.want & swap.mine.want & Want.PUNCH:
                nursery.start_soon(self._meet, session, swap, self.punch)

    async def _meet(self, session: Session, swap: Swap, punch: Punch) -> None:
        try:
            host, port = await punch(_meeting(swap, session.rtt_s or 0.0))
        except TunnelError as error:
            log.debug("no way of datagrams to %s: %s", swap.peer.short, error)
            return
        if swap.role is Role.DIALLER:
            await self._dial(session, [Candidate("quic", host, port, "reflexive")])

    async def _dial(self, session: Session, candidates: Sequence[Candidate]) -> None:
        if not candidates or session.suspected:
            return
        peer = session.peer
        try:
            proven = await race(peer, candidates, lambda one: self._attempt(peer, one), _close)
            if session.closed.is_set() or _is_late(proven, session):
                _close(proven)
            else:
                self._adopt(proven)
        except TunnelError as error:
            log.debug("no better link to %s: %s", peer.short, error)

    def _better(self, session: Session, candidates: Sequence[Candidate]) -> list[Candidate]:
        rank = session.rank
        if rank is None:
            return []
        return [
            one
            for one in ranked(candidates, self._is_near)
            if one.transport in self._kinds and rank_of(one, self._is_near(one.host)) < rank
        ]


def _is_indirect(session: Session) -> bool:
    return session.rank is not None and session.rank > DIRECT_RANK


def _is_late(proven: ProvenLink, session: Session) -> bool:
    """Another way was found meanwhile that is as good."""
    return session.rank is not None and proven.link.rank >= session.rank


def _meeting(swap: Swap, rtt_s: float) -> Meeting:
    """The answer takes half a round trip to get to the side that asked: then both begin."""
    theirs = [one for one in swap.theirs.candidates if one.transport == "quic"]
    return Meeting(
        swap.key,
        swap.role,
        tuple((one.host, one.port) for one in theirs),
        mine=Nats(swap.mine.nat_v4, swap.mine.nat_v6),
        theirs=Nats(swap.theirs.nat_v4, swap.theirs.nat_v6),
        begins_in_s=rtt_s / 2 if swap.role is Role.LISTENER else 0.0,
    )


def _by_tcp(swap: Swap) -> list[Candidate]:
    """A dial of these begins with a packet of 60 bytes; QUIC's would with 1,200, and again."""
    return [one for one in swap.theirs.candidates if one.transport == "tcp"]


def _close(proven: ProvenLink) -> None:
    proven.link.close(CloseCode.LINK_OVER, "another link was faster")
