"""What the commands about members ask of a node: invites, members, who is put out, who leaves.

Each answer is plain JSON. A running node answers on node.sock; where none runs, the command does
the same on the home itself, and other members hear of it when the node runs next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from discovery.grants import Grant, Role
from discovery.invites import MAX_USES, Invite
from discovery.revocations import Revocation, revoke_peer, withdraw_invite
from discovery.token import Token, encode
from meshnode.config import MAX_INVITE_LIFETIME_S
from meshnode.errors import AccessError, UsageError
from meshnode.joining import Joining
from meshnode.ledger import Ledger
from meshnode.membership import Membership
from tunnels import BadFrame, Candidate, PeerId, parse_peer_id_untrusted
from tunnels.peer import SHORT_LETTERS

OWN_MESH = "own"
MIN_ID_LETTERS = 4
Request = Mapping[str, Any]
Answer = Mapping[str, Any]


class Administration:
    """I answer for this node's meshes."""

    def __init__(
        self,
        membership: Membership,
        joining: Joining,
        candidates: Callable[[], Sequence[Candidate]],
    ) -> None:
        self._membership = membership
        self._ledger: Ledger = membership.ledger
        self._joining = joining
        self._candidates = candidates

    def answer(self, request: Request) -> Answer:
        """The answer to one of `OPERATIONS`. Raises `MeshError`."""
        return OPERATIONS[request["op"]](self, request)

    # -- invites ------------------------------------------------------------------------------

    def invite(self, role: Role, lifetime_s: int, uses: int, mesh: str | None = None) -> Token:
        """A new token. Raises `UsageError` where `mesh` is not named and several would do, and
        `AccessError` where we may not invite."""
        chosen = self._mesh_to_invite_to() if mesh is None else self._mesh(mesh)
        return self._joining.invite(
            self._candidates(), role=role, lifetime_s=lifetime_s, uses=uses, mesh=chosen
        )

    def make_invite(self, request: Request) -> Answer:
        role, lifetime_s, uses = parse_invite_request(request)
        mesh = request.get("mesh")
        token = self.invite(role, lifetime_s, uses, None if mesh is None else str(mesh))
        return self.invite_answer(token)

    def first_invite(self, lifetime_s: int, uses: int) -> Token:
        """The one that a node shows at its start: into our own mesh where no other will do."""
        try:
            return self.invite(Role.PEER, lifetime_s, uses)
        except (AccessError, UsageError):
            return self.invite(Role.PEER, lifetime_s, uses, OWN_MESH)

    def invite_answer(self, token: Token) -> Answer:
        return {
            "token": encode(token),
            "id": token.id.hex(),
            "mesh": str(PeerId(token.mesh)),
            "mesh_name": self._membership.mesh_name(token.mesh),
            "role": token.role.value,
            "expires_at": token.expires_at,
            "uses": token.uses,
        }

    def list_invites(self, _request: Request) -> Answer:
        self._ledger.invites.forget_old(self._ledger.now())
        return {"invites": [self._invite_row(one) for one in self._ledger.invites.invites()]}

    def revoke_invite(self, request: Request) -> Answer:
        """Withdraws an invite, for good and for every member to know."""
        invite = self._invite_of(str(request.get("id", "")))
        now, own = int(self._ledger.now()), self._ledger.grant(invite.mesh)
        if own is not None and now < invite.expires_at:
            sign = self._ledger.identity.sign
            until = invite.expires_at
            self._state(withdraw_invite(sign, id=invite.id, at=now, until=until, grant=own))
        self._ledger.invites.withdraw(invite.id)
        self._ledger.save_invites()
        return self._invite_row(self._invite_of(invite.id.hex()))

    def _invite_row(self, invite: Invite) -> dict[str, Any]:
        over = (
            (invite.withdrawn, "withdrawn"),
            (invite.expires_at <= self._ledger.now(), "expired"),
            (invite.uses_left < 1, "used up"),
        )
        return {
            "id": invite.id.hex(),
            "mesh": str(PeerId(invite.mesh)),
            "mesh_name": self._membership.mesh_name(invite.mesh),
            "role": invite.role.value,
            "state": next((word for is_so, word in over if is_so), "open"),
            "uses": invite.uses,
            "uses_left": invite.uses_left,
            "expires_at": invite.expires_at,
            "redeemed_by": [
                {
                    "name": self._membership.member_name(peer),
                    "peer": str(peer),
                    "member": self._ledger.members.shown(invite.mesh, peer) is not None,
                }
                for peer in invite.redeemed_by
            ],
        }

    def _invite_of(self, text: str) -> Invite:
        fits = [
            one
            for one in self._ledger.invites.invites()
            if len(text) >= MIN_ID_LETTERS and one.id.hex().startswith(text.lower())
        ]
        if len(fits) != 1:
            which = "several invites have ids that begin with" if fits else "there is no invite"
            raise UsageError(f"{which} {text!r}: `mesh invites` lists them")
        return fits[0]

    # -- members ------------------------------------------------------------------------------

    def list_members(self, _request: Request) -> Answer:
        """Members by mesh, ourselves first; meshes without others but for our own left out."""
        meshes = []
        for mesh in self._ledger.meshes():
            own = self._ledger.grant(mesh)
            others = self._ledger.members.of_mesh(mesh)
            if own is not None and (others or mesh == self._ledger.own_mesh):
                rows = [self._member_row(one) for one in (own, *others)]
                name = self._membership.mesh_name(mesh)
                meshes.append({"mesh": str(PeerId(mesh)), "name": name, "members": rows})
        return {"meshes": meshes}

    def list_meshes(self, _request: Request) -> Answer:
        """Every mesh that this node is a member of, and the node's own id."""
        names = {str(PeerId(one)): self._membership.mesh_name(one) for one in self._ledger.meshes()}
        return {"peer": str(self._ledger.identity.peer), "meshes": names}

    def _member_row(self, grant: Grant) -> dict[str, Any]:
        peer = grant.peer
        is_us = peer == self._ledger.identity.peer
        member = self._membership.member(peer)
        by_root = grant.issuer.key == grant.mesh
        return {
            "name": self._membership.member_name(peer),
            "peer": str(peer),
            "this_node": is_us,
            "role": grant.role.value,
            "may_invite": grant.may_invite,
            "depth": grant.depth,
            "invited_by": None if by_root else self._membership.member_name(grant.issuer),
            "since": grant.since,
            "expires_at": grant.expires_at,
            "connected": is_us or grant.mesh in self._membership.shown_by(peer),
            "last_seen": int(member.last_seen) if member and not is_us else None,
        }

    def remove_member(self, request: Request) -> Answer:
        """Puts a member out of one mesh, with all that it has given out and we do not know of."""
        given = request.get("mesh")
        mesh, peer = self._member(str(request.get("peer", "")), None if given is None else given)
        known = self._ledger.members.shown(mesh, peer)
        name = self._membership.member_name(peer)
        is_root = mesh == self._ledger.own_mesh
        own = self._ledger.grant(mesh)
        us = self._ledger.identity.peer
        if own is None:
            raise AccessError("this node is no member of that mesh: nothing to remove there")
        above = [] if known is None else [link.peer for link in known.chain()[:-1]]
        if not is_root and (us not in above or not own.may_invite):
            who = " or ".join(self._membership.member_name(one) for one in above) or "its founder"
            raise AccessError(f"only {who} may remove {name} from there: ask them")
        spared = self._spared(mesh, peer)
        revocation = revoke_peer(
            self._ledger.sign_as_root if is_root else self._ledger.identity.sign,
            mesh=mesh,
            peer=peer,
            issuer=PeerId(mesh) if is_root else us,
            at=max(int(self._ledger.now()), known.since if known else 0),
            grant=None if is_root else own,
            spared=spared,
        )
        answer = self._place(mesh, peer) | self._told(mesh, peer)
        self._state(revocation)
        return answer | {"stay": [self._membership.member_name(one.peer) for one in spared]}

    def leave_mesh(self, request: Request) -> Answer:
        """Takes our own place in a mesh back."""
        given = request.get("mesh")
        mesh = self._mesh_to_leave() if given is None else self._mesh(str(given))
        if mesh == self._ledger.own_mesh:
            raise AccessError(
                "the founder cannot leave its own mesh: remove its members (`mesh remove`), or "
                "start with a new home (--home)"
            )
        own, us = self._ledger.grant(mesh), self._ledger.identity.peer
        if own is None:
            raise AccessError("this node is no member of that mesh any more")
        revocation = revoke_peer(
            self._ledger.identity.sign,
            mesh=mesh,
            peer=us,
            issuer=us,
            at=max(int(self._ledger.now()), own.since),
            grant=own,
            spared=self._spared(mesh, us),
        )
        answer = self._place(mesh, us) | self._told(mesh, us)
        self._state(revocation)
        return answer

    def _state(self, revocation: Revocation) -> None:
        """Says so, here and to every member. Raises `AccessError` where the book is full."""
        self._membership.take((revocation,))
        if not self._ledger.revocations.knows(revocation):
            raise AccessError(
                "this mesh has had too many removals: those of a year ago are forgotten first, "
                "so try again later"
            )

    def _spared(self, mesh: bytes, peer: PeerId) -> list[Grant]:
        """What hangs on the peer's grant and holds now: it was known before the peer went."""
        return [
            grant
            for grant in self._ledger.members.of_mesh(mesh)
            if grant.peer != peer
            and any(link.peer == peer for link in grant.chain()[:-1])
            and self._ledger.why_void(grant) is None
        ]

    def _place(self, mesh: bytes, peer: PeerId) -> dict[str, Any]:
        return {
            "peer": str(peer),
            "name": self._membership.member_name(peer),
            "mesh": str(PeerId(mesh)),
            "mesh_name": self._membership.mesh_name(mesh),
        }

    def _told(self, mesh: bytes, peer: PeerId) -> dict[str, Any]:
        """Who hears of it at once; others when they connect to anyone who has."""
        others = [grant.peer for grant in self._ledger.members.of_mesh(mesh) if grant.peer != peer]
        connected = [one for one in others if mesh in self._membership.shown_by(one)]
        return {"members": len(others), "told": len(connected)}

    # -- what a user's words mean -------------------------------------------------------------

    def _mesh_to_invite_to(self) -> bytes:
        """The one mesh that has other members, our own where none has."""
        peopled = [mesh for mesh in self._ledger.meshes() if self._ledger.members.of_mesh(mesh)]
        if len(peopled) > 1:
            names = self._named(peopled)
            raise UsageError(f"this node is in several meshes, {names}: name one with --mesh ID")
        return peopled[0] if peopled else self._ledger.own_mesh

    def _mesh_to_leave(self) -> bytes:
        joined = [mesh for mesh in self._ledger.meshes() if mesh != self._ledger.own_mesh]
        if not joined:
            return self._ledger.own_mesh
        if len(joined) > 1:
            names = self._named(joined)
            raise UsageError(f"this node has joined {names}: name one with `mesh leave ID`")
        return joined[0]

    def _named(self, meshes: Sequence[bytes]) -> str:
        names = [f"{self._membership.mesh_name(one)} ({PeerId(one).short})" for one in meshes]
        return " and ".join(names)

    def _mesh(self, text: str) -> bytes:
        """`own`, or the beginning of a mesh's id, four letters at least."""
        if text == OWN_MESH:
            return self._ledger.own_mesh
        fits = [
            mesh
            for mesh in self._ledger.meshes()
            if len(text) >= MIN_ID_LETTERS and str(PeerId(mesh)).startswith(text.lower())
        ]
        if len(fits) != 1:
            raise UsageError(
                f"{text!r} names no mesh of this node, or several: use an id from `mesh members`, "
                f"or {OWN_MESH!r}"
            )
        return fits[0]

    def _member(self, text: str, mesh_text: str | None) -> tuple[bytes, PeerId]:
        """The place that is meant: by id, or else by name, or by the first eight letters of an id.

        Names are the members' own choice, another one's id among them: a whole id is no name."""
        within = self._ledger.meshes() if mesh_text is None else (self._mesh(str(mesh_text)),)
        places = [
            (mesh, grant.peer) for mesh in within for grant in self._ledger.members.of_mesh(mesh)
        ]
        whole = _whole_id(text)

        def is_meant(peer: PeerId) -> bool:
            if whole is not None:
                return peer == whole
            return text == self._membership.member_name(peer) or _is_beginning(text, peer)

        if is_meant(self._ledger.identity.peer):
            raise UsageError("this node itself is meant: use `mesh leave`")
        fits = [(mesh, peer) for mesh, peer in places if is_meant(peer)]
        if not fits and whole is not None and self._ledger.own_mesh in within:
            return self._ledger.own_mesh, whole
        peers = {peer for _, peer in fits}
        if len(peers) > 1:
            ids = ", ".join(str(peer) for peer in sorted(peers))
            raise UsageError(f"{text!r} may be any of {ids}: name it by its id")
        if len(fits) > 1:
            meshes = self._named([mesh for mesh, _ in fits])
            raise UsageError(f"{text} is in several meshes, {meshes}: name one with --mesh ID")
        if not fits:
            raise UsageError(f"there is no member {text!r}: `mesh members` lists them")
        return fits[0]


def parse_invite_request(request: Request) -> tuple[Role, int, int]:
    """Role, lifetime in seconds and uses that `mesh invite` asks for. Raises `UsageError`."""
    try:
        role = Role(request["role"])
        lifetime_s, uses = int(request["lifetime_s"]), int(request["uses"])
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UsageError("the request for an invite is incomplete") from None
    if not 1 <= lifetime_s <= MAX_INVITE_LIFETIME_S:
        raise UsageError("an invite lasts from a second to ten years: give --expires like 7d")
    if not 1 <= uses <= MAX_USES:
        raise UsageError(f"an invite has 1 to {MAX_USES} uses: give --uses in that range")
    return role, lifetime_s, uses


def _is_beginning(text: str, peer: PeerId) -> bool:
    return len(text) >= SHORT_LETTERS and str(peer).startswith(text.lower())


def _whole_id(text: str) -> PeerId | None:
    try:
        return parse_peer_id_untrusted(text)
    except BadFrame:
        return None


OPERATIONS: dict[str, Callable[[Administration, Request], Answer]] = {
    "invite": Administration.make_invite,
    "invites": Administration.list_invites,
    "revoke": Administration.revoke_invite,
    "members": Administration.list_members,
    "meshes": Administration.list_meshes,
    "remove": Administration.remove_member,
    "leave": Administration.leave_mesh,
}
"""What can be asked for by its name; all but `invite`, which tells addresses, also where no node
runs."""
