"""With whom this node keeps a session, of the members that it knows (`discovery.neighbourhood`)."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable

import trio

from discovery.grants import LENDERS
from discovery.neighbourhood import ALL_UP_TO, SECRET_BYTES, draw, neighbourhood
from discovery.roster import Member
from meshnode.membership import Membership
from tunnels import PeerId, Session

UNUSED_S = 60.0
"""How old a session is that is let go: who has just come may be about to ask for something."""
LET_GO = "the session was not needed: both nodes go on"
MAX_LENDERS = 24
"""Of a large mesh. A deployment has 16 at most (GGML_RPC_MAX_SERVERS), and some may be busy."""
RELAYS = 2
LENDS, RELAYS_FOR_OTHERS = "lend", "relay"
"""Roles in members' records."""


class Circle:
    """I say whom to keep in touch with, and which sessions are of no use.

    borrows: this node asks others for memory.
    renewers: who may renew our grants, where that is due.
    """

    def __init__(self, membership: Membership, renewers: Callable[[], Iterable[PeerId]]) -> None:
        self.borrows = False
        self.is_whole = True  # everybody known is in it
        self._membership = membership
        self._renewers = renewers
        self._lot = secrets.token_bytes(SECRET_BYTES)
        self._failed: dict[PeerId, float] = {}

    def tried(self, peer: PeerId, *, well: bool) -> None:
        """A member was dialled, has come, or has fallen silent: its session is kept, and meanwhile
        another stands in for it."""
        if well:
            self._failed.pop(peer, None)
        else:
            self._failed[peer] = trio.current_time()

    def wanted(self) -> frozenset[PeerId]:
        members = {member.peer: member for member in self._membership.members()}
        for gone in self._failed.keys() - members.keys():
            del self._failed[gone]
        self.is_whole = len(members) <= ALL_UP_TO
        if self.is_whole:
            return frozenset(members)
        needed = {*self._lenders(members), *self._relays(members), *self._renewers()}
        return neighbourhood(members, needed=needed, failed=self._failed, secret=self._lot)

    def unused(self, sessions: Iterable[Session], wanted: frozenset[PeerId]) -> list[Session]:
        """Sessions to end: we began them, and need them no more. What the other side needs it has
        begun, or begins again; a session with streams is left alone, and a silent one, which comes
        back or ends by itself."""
        ripe_s = trio.current_time() - UNUSED_S
        return [
            session
            for session in sessions
            if session.peer not in wanted and session.since_s < ripe_s
            if not session.streams and not session.suspected
            if (links := session.links()) and links[0].dialled_here
        ]

    def _lenders(self, members: dict[PeerId, Member]) -> list[PeerId]:
        if not self.borrows:
            return []
        ledger = self._membership.ledger
        lend = [
            peer
            for peer, member in members.items()
            if not member.roles or LENDS in member.roles
            if any(
                (grant := ledger.members.shown(mesh, peer)) is not None and grant.role in LENDERS
                for mesh in ledger.members.proven(peer)
            )
        ]
        well = [peer for peer in draw(lend, self._lot) if peer not in self._failed]
        return well[:MAX_LENDERS]

    def _relays(self, members: dict[PeerId, Member]) -> list[PeerId]:
        relay = [peer for peer, member in members.items() if RELAYS_FOR_OTHERS in member.roles]
        well = [peer for peer in draw(relay, self._lot) if peer not in self._failed]
        return well[:RELAYS]
