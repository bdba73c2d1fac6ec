"""The sessions of one endpoint: one a peer, whatever links come."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from tunnels.changes import Change, SessionDown, SessionUp
from tunnels.epochs import Epochs
from tunnels.errors import LinkClosed
from tunnels.link import CloseCode, ProvenLink
from tunnels.peer import PeerId
from tunnels.session import Session, SessionSetup

MAX_SESSIONS = 256
RESTARTED = "the peer has restarted"


class Sessions:
    """I give each proven link to the session it belongs to, and begin one where there is none.

    setup: of a session that begins; raises LinkClosed once the endpoint has stopped. attend: runs
    beside each, until it ends.
    """

    def __init__(
        self,
        setup: Callable[[], SessionSetup],
        attend: Callable[[Session], Awaitable[None]],
        tell: Callable[[Change], None],
    ) -> None:
        self._setup = setup
        self._attend = attend
        self._tell = tell
        self._of: dict[PeerId, Session] = {}
        self.epochs = Epochs()

    def __iter__(self) -> Iterator[Session]:
        """The oldest first."""
        return iter(list(self._of.values()))

    def get(self, peer: PeerId) -> Session | None:
        return self._of.get(peer)

    def adopt(self, proven: ProvenLink) -> Session:
        """The session this proven link belongs to, made when there is none. Raises LinkClosed."""
        if proven.own_epoch != self.epochs.of(proven.peer):
            proven.link.close(CloseCode.LINK_OVER, "the session that it was made for is over")
            raise LinkClosed("the session that this link was made for is over; connect again")
        proven.link.trusted = True
        session = self._of.get(proven.peer)
        if session is not None and session.epoch != proven.proven.epoch:
            session.end(RESTARTED)
            session = None
        if session is None:
            return self._begin(proven)
        session.add_link(proven)
        return session

    def _begin(self, proven: ProvenLink) -> Session:
        if len(self._of) >= MAX_SESSIONS:
            proven.link.close(CloseCode.REFUSED, "too many peers are connected here")
            raise LinkClosed("too many peers are connected to this node; stop some first")
        setup = self._setup()
        session = self._of[proven.peer] = Session(proven, setup)
        session.add_link(proven)
        self._tell(SessionUp(session))
        setup.nursery.start_soon(self._attend, session)
        return session

    def ended(self, session: Session) -> None:
        """To be called by each."""
        if session.close_reason != RESTARTED:
            # Of this it may never hear, and would come back to a session that is no more.
            self.epochs.renew(session.peer)
        if self._of.get(session.peer) is session:
            del self._of[session.peer]
            self._tell(SessionDown(session, session.close_reason or ""))
