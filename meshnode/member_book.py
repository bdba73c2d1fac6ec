"""The members of our meshes that we know: what each says of itself, and the grants it has shown.

A member comes itself, over a session that proves its key, or others pass on its word, signed by
whom it is about. Sans-IO: `now` comes in as unix seconds. Grants are judged by who enters them:
they hang on what was revoked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

from discovery.grants import Grant, GrantError, encode_grant, parse_grant_untrusted
from discovery.roster import MEMBER_LIFETIME_S, BadRosterState, Member, Roster
from tunnels.peer import PeerId

MAX_HEARD_OF_ONE = 64
"""Members of one inviter that are taken from others' words: it could make up any number of them,
and all are dialled. The founder is not held to it; nor are those who come themselves."""

Verify = Callable[[Grant, PeerId], None]
"""Raises `GrantError` unless the grant makes the peer a member now."""


class BadMemberState(Exception):
    """Saved state that no member book wrote."""


class Heard(Enum):
    """What became of a record that another member passed on."""

    REFUSED = "refused"
    OLD = "old"  # we have it, or a newer one
    SAME = "same"  # newer, and says the same
    NEWS = "news"


class MemberBook:
    """I keep members' words about themselves, and their places in our meshes."""

    def __init__(self) -> None:
        self.roster = Roster()
        self._shown: dict[tuple[bytes, PeerId], Grant] = {}

    def proven(self, peer: PeerId) -> frozenset[bytes]:
        """The meshes that `peer` has proven to be a member of."""
        return frozenset(mesh for mesh, member in self._shown if member == peer)

    def shown(self, mesh: bytes, peer: PeerId) -> Grant | None:
        """The grant that `peer` has shown last in `mesh`."""
        return self._shown.get((mesh, peer))

    def of_mesh(self, mesh: bytes) -> tuple[Grant, ...]:
        """What the members known have shown in `mesh`, ourselves left out, by PeerId."""
        grants = [grant for (one, _), grant in self._shown.items() if one == mesh]
        return tuple(sorted(grants, key=lambda grant: grant.peer))

    def enter(self, word: Member, grants: Iterable[Grant], now: float) -> bool:
        """Takes a member's word about itself and the grants that it has shown, verified. Says
        whether anything has changed but the moment it was heard."""
        news = self.roster.merge(word)
        for grant in grants:
            key = (grant.mesh, grant.peer)
            news |= self._shown.get(key) != grant
            self._shown[key] = grant
        gone = self.roster.expire(now)
        self._forget([key for key in self._shown if self.roster.get(key[1]) is None])
        return news or bool(gone)

    def hear_of(self, word: Member, grant: Grant, now: float, verify: Verify) -> Heard:
        """Takes what another member passes on, signed by whom it is about.

        Raises `GrantError` where the grant does not make it a member.
        """
        known = self._shown.get((grant.mesh, word.peer))
        is_newer = known is None or known.issued_at < grant.issued_at
        if not (is_newer or self.roster.is_older_than(word)):
            return Heard.OLD  # before any signature is looked at, which is work
        if now - word.last_seen > MEMBER_LIFETIME_S:
            return Heard.REFUSED
        if known is None and not self._has_room_for_one_of(grant):
            return Heard.REFUSED
        if not word.is_signed():
            return Heard.REFUSED
        verify(grant, word.peer)
        news = self.roster.merge_hearsay(word)
        if self.roster.get(word.peer) is None:
            return Heard.REFUSED  # there is no room
        if is_newer:
            self._shown[grant.mesh, word.peer] = grant
        return Heard.NEWS if news or is_newer else Heard.SAME

    def _has_room_for_one_of(self, grant: Grant) -> bool:
        """Whether one more of its inviter's may be taken from others' words."""
        by_founder = grant.depth <= 2
        same = (one for one in self._shown.values() if one.issuer == grant.issuer)
        return by_founder or sum(1 for _ in same) < MAX_HEARD_OF_ONE

    def forget_mesh(self, mesh: bytes) -> None:
        """Also the members known from this mesh alone."""
        self._forget([key for key in self._shown if key[0] == mesh])

    def forget_void(self, is_void: Callable[[Grant], bool]) -> bool:
        """Says whether there were places of which the grant is void."""
        gone = [key for key, grant in self._shown.items() if is_void(grant)]
        self._forget(gone)
        return bool(gone)

    def _forget(self, places: Iterable[tuple[bytes, PeerId]]) -> None:
        """Forgets these places; a member that has no other is forgotten whole."""
        for mesh, peer in places:
            self._shown.pop((mesh, peer), None)
            if not self.proven(peer):
                self.roster.forget(peer)

    def to_state(self) -> dict[str, Any]:
        """Plain JSON values."""
        shown = [encode_grant(grant).hex() for grant in self._shown.values()]
        return {"roster": self.roster.to_state(), "shown": shown}

    @classmethod
    def from_state_untrusted(cls, state: Mapping[str, Any]) -> MemberBook:
        """The book that `to_state` gave; raises `BadMemberState` and nothing else."""
        book = cls()
        try:
            book.roster = Roster.from_state_untrusted(state["roster"])
            for text in state["shown"]:
                grant = parse_grant_untrusted(bytes.fromhex(text))
                book._shown[grant.mesh, grant.peer] = grant
        except (BadRosterState, GrantError, KeyError, TypeError, ValueError) as error:
            raise BadMemberState("the saved members are damaged") from error
        return book
