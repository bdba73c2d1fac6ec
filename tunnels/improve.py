"""Start on the first link that works, and go on looking for a better one."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from tunnels.dial import race, rank_of, ranked
from tunnels.errors import TunnelError
from tunnels.link import CloseCode, ProvenLink
from tunnels.peer import Candidate, PeerId
from tunnels.session import Session

FIRST_PAUSE_S = 1.0  # after a session has begun, or its links have changed
LAST_PAUSE_S = 60.0

log = logging.getLogger(__name__)


class Improver:
    """I try, now and then, whether a peer can be reached by a better link than its session has.

    attempt: a proven link over a candidate. adopt: make it part of the peer's session, which then
    moves its streams over.
    """

    def __init__(
        self,
        is_near: Callable[[str], bool],
        attempt: Callable[[PeerId, Candidate], Awaitable[ProvenLink]],
        adopt: Callable[[ProvenLink], Session],
    ) -> None:
        self._is_near = is_near
        self._attempt = attempt
        self._adopt = adopt
        self._candidates: dict[Session, tuple[Candidate, ...]] = {}

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

    async def _run(self, session: Session) -> None:
        try:
            pause_s = FIRST_PAUSE_S
            while not session.closed.is_set():
                with trio.move_on_after(pause_s) as pause:
                    await session.wait_links_changed()
                if not pause.cancelled_caught:
                    pause_s = FIRST_PAUSE_S
                    continue
                await self._try(session)
                pause_s = min(2 * pause_s, LAST_PAUSE_S)
        finally:
            del self._candidates[session]

    async def _try(self, session: Session) -> None:
        better = self._better(session)
        if not better or session.suspected:
            return
        peer = session.peer
        try:
            proven = await race(peer, better, lambda one: self._attempt(peer, one), _close)
            if session.closed.is_set():
                _close(proven)
            else:
                self._adopt(proven)
        except TunnelError as error:
            log.debug("no better link to %s: %s", peer.short, error)

    def _better(self, session: Session) -> list[Candidate]:
        best = session.best_link
        if best is None:
            return []
        rank = best.rank
        candidates = ranked(self._candidates[session], self._is_near)
        return [one for one in candidates if rank_of(one, self._is_near(one.host)) < rank]


def _close(proven: ProvenLink) -> None:
    proven.link.close(CloseCode.LINK_OVER, "another link was faster")
