"""What this node knows of its meshes, and keeps: grants, members, invites, revocations.

State on disk: `root.key` (the mesh this node founded), `membership.json` (our grants, the members
we know and the grants each has shown), `invites.json` (hashes of secrets, uses left),
`revocations.json` (what was taken back). What is said to have happened has been written before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from discovery.digest import MAX_NUMBER
from discovery.grants import (
    Grant,
    GrantError,
    Role,
    encode_grant,
    is_dated_ahead,
    issue,
    issue_root,
    parse_grant_untrusted,
    renewal_due,
    verify_grant,
)
from discovery.invites import BadInviteState, Invite, InviteBook
from discovery.revocations import (
    BadRevocationState,
    BookFull,
    Revocation,
    RevocationBook,
    RevocationError,
)
from discovery.roster import Member
from meshnode.errors import BadMessage, MeshError
from meshnode.member_book import BadMemberState, Heard, MemberBook
from meshnode.state import Home
from tunnels import Identity, PeerId

log = logging.getLogger(__name__)

SEEN_SAVED_EVERY_S = 24 * 3600
"""How stale the moments on disk at which members were heard may grow: they count in weeks."""
WORTH_RENEWING_S = 24 * 3600
"""By how much longer a renewed grant must hold to be asked for, or given, before it is due."""

_GRANTS = "membership.json"
_INVITES = "invites.json"
_REVOCATIONS = "revocations.json"
_FORMAT = 2
_WRONG_SHAPE = (KeyError, TypeError, ValueError, AttributeError)


class GrantRevoked(GrantError):
    """The grant, or one it hangs on, was taken back by `revocation`."""

    def __init__(self, revocation: Revocation) -> None:
        super().__init__("the grant was revoked: ask for a new invite")
        self.revocation = revocation


class Ledger:
    """I keep what this node knows about its meshes, in memory and on disk."""

    def __init__(
        self, home: Home, identity: Identity, wall_clock: Callable[[], float] = time.time
    ) -> None:
        """Raises `HomeError` for a file that cannot be read back."""
        self.now = wall_clock
        self.identity = identity
        self.revocations = RevocationBook()
        self.invites = InviteBook()
        self.members = MemberBook()
        self.own_number = 0  # of our newest record, as far as we know or were told
        self._home = home
        self._root = home.identity("root.key")
        self._grants: dict[bytes, Grant] = {}
        self._load()
        self._invites_on_disk = self.invites.to_state()
        self._revocations_unsaved = False
        self._seen_saved_at = 0.0
        self.members.roster.expire(self.now())
        self.settle()
        self.apply_revocations()
        self.renew_own_mesh()

    # -- our own place ------------------------------------------------------------------------

    @property
    def own_mesh(self) -> bytes:
        return self._root.peer.key

    def grant(self, mesh: bytes) -> Grant | None:
        """Our grant in `mesh`; None where we hold none that is good now."""
        grant = self._grants.get(mesh)
        return grant if grant is not None and self.why_void(grant) is None else None

    def own_place(self, mesh: bytes) -> Grant | None:
        """Our grant in `mesh`, good or not."""
        return self._grants.get(mesh)

    def meshes(self) -> tuple[bytes, ...]:
        """The meshes that we are a member of, our own first."""
        good = [mesh for mesh in self._grants if self.grant(mesh) is not None]
        return tuple(sorted(good, key=lambda mesh: (mesh != self.own_mesh, mesh)))

    def keep_grant(self, grant: Grant) -> None:
        """Takes a grant of ours, given or renewed; on disk when this returns."""
        self._grants[grant.mesh] = grant
        self.save_members()

    def own_grants(self) -> tuple[Grant, ...]:
        """All that we hold, good or not."""
        return tuple(self._grants.values())

    def next_number(self) -> int:
        """For a record of ours: milliseconds of the wall clock, and higher than any before, though
        the clock or the disk was set back. What the clock alone would not give again is on disk
        when this returns, if the disk takes it."""
        by_clock = int(self.now() * 1000)
        self.own_number = min(max(by_clock, self.own_number + 1), MAX_NUMBER)
        if self.own_number != by_clock:
            try:
                self.save_members()
            except MeshError as error:
                log.warning("%s", error)
        return self.own_number

    def leave_mesh(self, mesh: bytes) -> None:
        """Forgets our grant, and the members that we know from this mesh alone."""
        self._grants.pop(mesh, None)
        self.members.forget_mesh(mesh)
        self.save_members()

    def renew_own_mesh(self) -> bool:
        """Founds our own mesh, or signs our place in it anew when that is due. Says whether.

        Also one that our own clock dated ahead before it was set right: nobody takes that.
        """
        grant, now = self._grants.get(self.own_mesh), self.now()
        if grant is not None and not (renewal_due(grant, now) or is_dated_ahead(grant, now)):
            return False
        own = issue_root(
            self._root.sign,
            mesh=self.own_mesh,
            peer=self.identity.peer,
            role=Role.PEER,
            issued_at=int(self.now()),
            may_invite=True,
        )
        self.keep_grant(own)
        return True

    # -- judging grants -----------------------------------------------------------------------

    def verify(self, grant: Grant, peer: PeerId) -> None:
        """Raises `GrantError` unless this grant makes `peer` a member of its mesh now."""
        verify_grant(grant, mesh=grant.mesh, peer=peer, now=self.now())
        revocation = self.revocations.void_by(grant)
        if revocation is not None:
            raise GrantRevoked(revocation)

    def why_void(self, grant: Grant) -> str | None:
        """Why a grant that was verified once does not hold now; None while it does."""
        if self.revocations.void_by(grant) is not None:
            return "the membership was revoked"
        if grant.expires_at <= self.now():
            return "the membership has expired"
        return None

    def hangs_on_revoked(self, grant: Grant) -> bool:
        """Whether the grant was spared when one that it hangs on was revoked."""
        return any(self.revocations.void_by(link) is not None for link in grant.chain()[:-1])

    # -- giving grants ------------------------------------------------------------------------

    def issue_grant(
        self, mesh: bytes, peer: PeerId, role: Role, *, chosen_at: int | None = None
    ) -> Grant:
        """A place in `mesh` for `peer`, who was chosen at `chosen_at`, or just now: an invite
        chooses when it is made, so what was said against the peer later voids the grant, also
        where we had not heard it. Raises `GrantError`."""
        own = self._own_or_refuse(mesh)
        now = int(self.now())
        since = now if chosen_at is None else min(now, chosen_at)
        since = max(since, self.revocations.newest_against(peer, own) + 1)
        return issue(
            own,
            self.identity.sign,
            peer=peer,
            role=role,
            issued_at=max(now, since),
            since=since,
            may_invite=role is Role.PEER,
        )

    def renew(self, grant: Grant) -> Grant:
        """The same place for longer: role, right and `since` stay, the chain may be shorter.

        Raises `GrantError` where that is not ours to do, or of no use.
        """
        own = self._own_or_refuse(grant.mesh)
        if grant.mesh != self.own_mesh and grant.issuer != self.identity.peer:
            raise GrantError("only its inviter or the mesh's founder renews a grant: ask them")
        renewed = issue(
            own,
            self.identity.sign,
            peer=grant.peer,
            role=grant.role,
            issued_at=max(int(self.now()), grant.issued_at),
            may_invite=grant.may_invite,
            since=grant.since,
        )
        longer_s = renewed.expires_at - grant.expires_at
        if longer_s < WORTH_RENEWING_S and not self.hangs_on_revoked(grant):
            raise GrantError("a renewed grant would hold no longer than the one there is")
        return renewed

    def _own_or_refuse(self, mesh: bytes) -> Grant:
        own = self.grant(mesh)
        if own is None:
            raise GrantError("the inviter is no member of the mesh any more: ask another member")
        return own

    # -- members ------------------------------------------------------------------------------

    def remember(self, word: Member, grants: Iterable[Grant]) -> None:
        """Enters a member's word about itself and the grants that it has shown, verified.

        The disk is only written for news: each write is a flush.
        """
        news = self.members.enter(word, grants, self.now())
        if news or self.now() - self._seen_saved_at > SEEN_SAVED_EVERY_S:
            self.save_members()

    def hear_of(self, word: Member, grant: Grant) -> Heard:
        """Takes what another member passes on, signed by whom it is about. After news,
        `save_members` is due.

        Raises `GrantError` where the grant does not make it a member.
        """
        if word.peer == self.identity.peer:
            return self._hear_of_us(word)
        return self.members.hear_of(word, grant, self.now(), self.verify)

    def _hear_of_us(self, word: Member) -> Heard:
        """A record of ours from before our disk or our clock was set back goes round: the next one
        needs a higher number. Nobody else can have signed it."""
        if word.seq > self.own_number and word.is_signed():
            self.own_number = word.seq
        return Heard.OLD

    # -- what is taken back -------------------------------------------------------------------

    def sign_as_root(self, label: str, payload: bytes) -> bytes:
        return self._root.sign(label, payload)

    def take(self, revocations: Iterable[Revocation]) -> tuple[Revocation, ...]:
        """Takes what others say was taken back, each one that is right; returns the news.

        What was heard is on disk before it counts. Where the disk refuses, it counts all the same:
        `MeshError` is raised then, and `settle` tries again. What comes after one that nobody said
        is not looked at, and `BadMessage` raised: whoever passes it on has not checked it, as
        members do, and checking is work.
        """
        news: list[Revocation] = []
        wrong: RevocationError | None = None
        for one in revocations:
            try:
                if self.revocations.add(one, self.now()):
                    news.append(one)
            except BookFull as error:
                log.warning("a revocation by %s is not taken: %s", one.issuer.short, error)
            except RevocationError as error:
                wrong = error
                break
        if news:
            self._revocations_unsaved = True
            try:
                self._save_revocations()
            finally:
                self.apply_revocations()
        if wrong is not None:
            raise BadMessage(f"what the peer says was revoked does not hold: {wrong}")
        return tuple(news)

    def apply_revocations(self) -> None:
        """Brings members, invites and our own grants in line with what was taken back."""
        voids = self.revocations.void_by
        gone = self.members.forget_void(lambda grant: voids(grant) is not None)
        lost = [mesh for mesh, grant in self._grants.items() if voids(grant) is not None]
        for mesh in lost:
            self.leave_mesh(mesh)
        if gone and not lost:
            self.save_members()
        self._withdraw_invites()

    def _withdraw_invites(self) -> None:
        """Those we said so of, perhaps before our disk was set back, and those that somebody who
        was put out still holds."""
        withdrawn = {said.subject for said in self.revocations.withdrawn(self.identity.peer)}
        for invite in self.invites.invites():
            if invite.id in withdrawn or self._is_held_outside(invite):
                self.invites.withdraw(invite.id)
        self.save_invites()

    def _is_held_outside(self, invite: Invite) -> bool:
        own = self._grants.get(invite.mesh)
        if own is None:
            return False
        removed_at = [self.revocations.removed_at(peer, own) for peer in invite.redeemed_by]
        return any(moment >= invite.created_at for moment in removed_at)

    def settle(self) -> None:
        """Forgets what is over, and writes what an earlier try failed to."""
        if self.revocations.expire(self.now()):
            self._revocations_unsaved = True
        try:
            self._save_revocations()
        except MeshError as error:
            log.error("%s", error)

    # -- state on disk ------------------------------------------------------------------------

    def _load(self) -> None:
        if (state := self._home.load_json(_REVOCATIONS)) is not None:
            try:
                self.revocations = RevocationBook.from_state_untrusted(state)
            except BadRevocationState as error:
                raise self._home.damaged(_REVOCATIONS) from error
        if (state := self._home.load_json(_INVITES)) is not None:
            try:
                self.invites = InviteBook.from_state_untrusted(state)
            except BadInviteState as error:
                raise self._home.damaged(_INVITES) from error
        if (state := self._home.load_json(_GRANTS)) is not None:
            try:
                self._load_members(state)
            except (GrantError, BadMemberState, *_WRONG_SHAPE) as error:
                raise self._home.damaged(_GRANTS) from error

    def _load_members(self, state: dict[str, Any]) -> None:
        if state["format"] != _FORMAT:
            raise ValueError("written by another version")
        for text in state["grants"]:
            grant = parse_grant_untrusted(bytes.fromhex(text))
            self._grants[grant.mesh] = grant
        self.members = MemberBook.from_state_untrusted(state)
        number = state.get("number", 0)
        if not isinstance(number, int) or not 0 <= number <= MAX_NUMBER:
            raise ValueError("a number out of range")
        self.own_number = number

    def save_members(self) -> None:
        grants = [encode_grant(grant).hex() for grant in self._grants.values()]
        document = {
            "format": _FORMAT,
            "grants": grants,
            **self.members.to_state(),
            "number": self.own_number,
        }
        self._home.save_json(_GRANTS, document)
        self._seen_saved_at = self.now()

    def save_invites(self) -> None:
        """Writes what the disk does not hold yet: also what an earlier try failed to write."""
        state = self.invites.to_state()
        if state != self._invites_on_disk:
            self._home.save_json(_INVITES, state)
            self._invites_on_disk = state

    def _save_revocations(self) -> None:
        if self._revocations_unsaved:
            self._home.save_json(_REVOCATIONS, self.revocations.to_state())
            self._revocations_unsaved = False
