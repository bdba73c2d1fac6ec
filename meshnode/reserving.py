"""This node stays reachable through relays of its meshes: the two best that it reaches itself.

Where none of its peers is a relay, those that it could dial stand in: they carry introductions, by
which two nodes behind NATs find each other. What changes in where we are reachable is shown to all
who are connected, who pass it on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

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
FIRST_PAUSE_S = 5.0  # after a relay has refused, and twice as long each time
LAST_PAUSE_S = 60.0
REMEMBERED_S = 600.0  # that it did
PROVEN_AFTER_S = 60.0  # of having us: what it refused before is forgotten


@dataclass(frozen=True)
class _Pause:
    """Of a relay that failed us. length_s: of this one."""

    until_s: float
    length_s: float


class Reserving:
    """I hold the reservations of a node."""

    def __init__(self, endpoint: Endpoint, membership: Membership) -> None:
        self._endpoint = endpoint
        self._membership = membership
        self._holding: dict[PeerId, trio.CancelScope] = {}
        self._pauses: dict[PeerId, _Pause] = {}
        self._woken = trio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._membership.follow, lambda: self._woken.set())
            while True:
                woken = self._woken = trio.Event()
                self._forget_old_pauses()
                chosen = self._choose()
                for peer, scope in self._holding.items():
                    if peer not in chosen:
                        scope.cancel()
                for peer, session in chosen.items():
                    if peer not in self._holding:
                        scope = self._holding[peer] = trio.CancelScope()
                        nursery.start_soon(self._hold, session, scope)
                with trio.move_on_after(LOOK_AGAIN_S):
                    await woken.wait()

    # -- at whom ------------------------------------------------------------------------------

    def _choose(self) -> dict[PeerId, Session]:
        relays: list[Session] = []
        introducers: list[Session] = []
        for known in self._membership.acquaintances():
            session, member = known.session, self._membership.member(known.peer)
            best = None if session is None else session.best_link
            if session is None or member is None or best is None or not known.introduced:
                continue
            if known.parting or best.kind == KIND or self._pauses_s(known.peer) > 0:
                continue
            says_so = RELAYS_FOR_OTHERS in member.roles
            if says_so or relays_for_others(member.candidates, known.peer):
                relays.append(session)
            elif best.role is Role.DIALLER:  # others may be able to dial it, too
                introducers.append(session)
        best_ones = self._best(relays, MAX_RELAYS) or self._best(introducers, MAX_INTRODUCERS)
        return {session.peer: session for session in best_ones}

    def _best(self, sessions: Sequence[Session], count: int) -> list[Session]:
        """Those that have us stay: every change is told to all. Who was asked and says nothing has
        no such claim, and who failed us comes last: anyone may call itself a relay."""
        agreed = {one.relay for one in self._endpoint.relaying.reservations()}

        def preference(session: Session) -> tuple[bool, bool, float, float]:
            peer = session.peer
            pause = self._pauses.get(peer)
            failed_s = 0.0 if pause is None else pause.length_s
            return peer not in agreed, peer not in self._holding, failed_s, session.rtt_s or 1.0

        return sorted(sessions, key=preference)[:count]

    def _pauses_s(self, peer: PeerId) -> float:
        """How long it is not asked."""
        pause = self._pauses.get(peer)
        return 0.0 if pause is None else pause.until_s - trio.current_time()

    def _forget_old_pauses(self) -> None:
        for peer in [one for one in self._pauses if self._pauses_s(one) < -REMEMBERED_S]:
            del self._pauses[peer]

    # -- holding ------------------------------------------------------------------------------

    async def _hold(self, session: Session, scope: trio.CancelScope) -> None:
        peer, agreed_s = session.peer, math.inf

        def agreed(held: Reservation) -> None:
            nonlocal agreed_s
            agreed_s = trio.current_time()
            log.info("reachable through %s: %s", peer.short, held.carries.name.lower())
            self._endpoint.tell_candidates_changed()

        try:
            with scope:
                await self._endpoint.relaying.reserve(session, self._places(session), agreed)
        except TunnelError as error:
            log.info("%s cannot be reserved at: %s", peer.short, error)
        finally:
            del self._holding[peer]
            if not scope.cancelled_caught:
                self._pause(peer, held_s=trio.current_time() - agreed_s)
            self._endpoint.tell_candidates_changed()
            self._woken.set()

    def _pause(self, peer: PeerId, held_s: float) -> None:
        before = self._pauses.get(peer)
        length_s = FIRST_PAUSE_S
        if before is not None and held_s < PROVEN_AFTER_S:
            length_s = min(2 * before.length_s, LAST_PAUSE_S)
        self._pauses[peer] = _Pause(trio.current_time() + length_s, length_s)

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
