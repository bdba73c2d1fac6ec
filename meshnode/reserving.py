"""This node stays reachable through relays of its meshes: the two best that it reaches itself.

Where none of its peers is a relay, those that it could dial stand in: they carry introductions, by
which two nodes behind NATs find each other. What changes in where we are reachable is shown to all
who are connected, who pass it on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from meshnode.circle import RELAYS_FOR_OTHERS
from meshnode.membership import Membership
from tunnels import Candidate, Endpoint, PeerId, Session, TunnelError
from tunnels.handshake import Role
from tunnels.relay import KIND
from tunnels.relay_transport import Reservation
from tunnels.relaying import relays_for_others

log = logging.getLogger(__name__)

MAX_RELAYS = 2
MAX_INTRODUCERS = 2
LOOK_AGAIN_S = 10.0  # a session may have found a straight link meanwhile
TRY_AGAIN_S = 5.0  # after a relay has refused


class Reserving:
    """I hold the reservations of a node."""

    def __init__(self, endpoint: Endpoint, membership: Membership) -> None:
        self._endpoint = endpoint
        self._membership = membership
        self._holding: dict[PeerId, trio.CancelScope] = {}
        self._not_before_s: dict[PeerId, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                changed = self._membership.changed
                chosen = self._choose()
                for peer, scope in self._holding.items():
                    if peer not in chosen:
                        scope.cancel()
                for peer, session in chosen.items():
                    if peer not in self._holding and self._may_ask(peer):
                        scope = self._holding[peer] = trio.CancelScope()
                        nursery.start_soon(self._hold, session, scope)
                with trio.move_on_after(LOOK_AGAIN_S):
                    await changed.wait()

    # -- at whom ------------------------------------------------------------------------------

    def _choose(self) -> dict[PeerId, Session]:
        relays: list[Session] = []
        introducers: list[Session] = []
        for known in self._membership.acquaintances():
            session, member = known.session, self._membership.member(known.peer)
            best = None if session is None else session.best_link
            if session is None or member is None or best is None or not known.introduced:
                continue
            if known.parting or best.kind == KIND:
                continue
            says_so = RELAYS_FOR_OTHERS in member.roles
            if says_so or relays_for_others(member.candidates, known.peer):
                relays.append(session)
            elif best.role is Role.DIALLER:  # others may be able to dial it, too
                introducers.append(session)
        best_ones = self._best(relays, MAX_RELAYS) or self._best(introducers, MAX_INTRODUCERS)
        return {session.peer: session for session in best_ones}

    def _best(self, sessions: Sequence[Session], count: int) -> list[Session]:
        """Those that we have stay: every change is told to all."""

        def preference(session: Session) -> tuple[bool, float]:
            return session.peer not in self._holding, session.rtt_s or 1.0

        return sorted(sessions, key=preference)[:count]

    def _may_ask(self, peer: PeerId) -> bool:
        return trio.current_time() >= self._not_before_s.get(peer, 0.0)

    # -- holding ------------------------------------------------------------------------------

    async def _hold(self, session: Session, scope: trio.CancelScope) -> None:
        peer = session.peer
        try:
            with scope:
                await self._endpoint.relaying.reserve(session, self._places(session), self._tell)
        except TunnelError as error:
            log.info("%s cannot be reserved at: %s", peer.short, error)
        finally:
            del self._holding[peer]
            self._not_before_s[peer] = trio.current_time() + TRY_AGAIN_S
            self._endpoint.tell_candidates_changed()

    def _tell(self, held: Reservation) -> None:
        log.info("reachable through %s: %s", held.relay.short, held.carries.name.lower())
        self._not_before_s.pop(held.relay, None)
        self._endpoint.tell_candidates_changed()

    def _places(self, session: Session) -> list[Candidate]:
        """Where others may reach the relay: where we have, and at its other ports there, which a
        firewall may let through; then what else it says."""
        member = self._membership.member(session.peer)
        said = [one for one in member.candidates if one.via is None] if member else []
        host = _host_reached(session)
        return sorted(said, key=lambda one: one.host != host)


def _host_reached(session: Session) -> str | None:
    """Where the peer answers, where it was us who dialled."""
    best = session.best_link
    if best is None or best.role is not Role.DIALLER:
        return None
    return best.remote.rpartition(":")[0].strip("[]")
