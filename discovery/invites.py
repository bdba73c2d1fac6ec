"""The inviter's book: which invites are out, and who has used them.

I keep a hash of each secret, never the secret. A use is burned by the joiner's key: the same peer
redeeming again, because the answer to its first try got lost, burns nothing. Whoever was put out of
a mesh may come back by an invite made after that, never by the one it still has.

Sans-IO: `now` comes in; `to_state` gives plain values for whoever writes them to disk. A redemption
counts only once that state is durable, so the caller saves before it answers.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from blake3 import blake3

from discovery.grants import Role
from discovery.token import ID_BYTES, Secret
from tunnels.errors import BadFrame
from tunnels.peer import KEY_BYTES, PeerId, parse_peer_id_untrusted

_HASH_CONTEXT = "mesh invite secret 1"
_HASH_BYTES = 32
_FORMAT = 2
MAX_USES = 65535
LISTED_AFTER_END_S = 30 * 24 * 3600
"""How long an invite that is over stays in the book, to say why it is refused."""


class InviteRefused(Exception):
    """A redemption was refused; the sentence is meant for the person who holds the token."""


class UnknownInvite(InviteRefused):
    """No such invite: another node's, or one forgotten since it expired."""


class WrongSecret(InviteRefused):
    """The id is ours, the secret is not."""


class InviteExpired(InviteRefused):
    """The invite's time is over."""


class InviteUsedUp(InviteRefused):
    """Every use is burned."""


class InviteWithdrawn(InviteRefused):
    """The inviter took it back."""


class JoinerRemoved(InviteRefused):
    """The joiner was put out of the mesh after the invite was made."""


class BadInviteState(Exception):
    """Saved state that this book did not write."""


@dataclass(frozen=True)
class Invite:
    """One invite as the inviter keeps it. `redeemed_by` are the joiners, in order."""

    id: bytes
    secret_hash: bytes
    mesh: bytes
    role: Role
    created_at: int
    expires_at: int
    uses: int
    redeemed_by: tuple[PeerId, ...] = ()
    withdrawn: bool = False

    @property
    def uses_left(self) -> int:
        return self.uses - len(self.redeemed_by)


@dataclass(frozen=True)
class Redemption:
    """A use was burned for `peer`, or, if `repeated`, had been before."""

    id: bytes
    peer: PeerId
    mesh: bytes
    role: Role
    uses_left: int
    repeated: bool


class InviteBook:
    """The invites one node has given out."""

    def __init__(self) -> None:
        self._invites: dict[bytes, Invite] = {}

    def create(
        self,
        id: bytes,
        secret: Secret,
        *,
        mesh: bytes,
        role: Role,
        created_at: int,
        expires_at: int,
        uses: int,
    ) -> Invite:
        """Enters an invite. `ValueError` for an id of the wrong length or in use, or for `uses`
        outside 1 to 65535."""
        if len(id) != ID_BYTES or id in self._invites:
            raise ValueError("an invite's id is eight bytes and used once")
        if not 1 <= uses <= MAX_USES:
            raise ValueError(f"an invite has 1 to {MAX_USES} uses")
        invite = Invite(id, secret_hash(secret), mesh, role, created_at, expires_at, uses)
        self._invites[id] = invite
        return invite

    def get(self, id: bytes) -> Invite | None:
        return self._invites.get(id)

    def invites(self) -> tuple[Invite, ...]:
        """Every invite in the book, also those that are over, the oldest first."""
        return tuple(self._invites.values())

    def check(self, id: bytes, secret: Secret) -> Invite:
        """The invite of this id and secret; raises `UnknownInvite` or `WrongSecret`."""
        invite = self._invites.get(id)
        if invite is None:
            raise UnknownInvite("this node knows no such invite: ask for a new one (`mesh invite`)")
        if not hmac.compare_digest(invite.secret_hash, secret_hash(secret)):
            raise WrongSecret("the invite's secret is wrong: copy the whole token again")
        return invite

    def redeem(
        self, id: bytes, secret: Secret, joiner: PeerId, now: float, *, removed_at: int = 0
    ) -> Redemption:
        """Burns one use for `joiner`. Raises an `InviteRefused`.

        removed_at: when the joiner was last put out of the invite's mesh, unix seconds; 0: never.
        """
        invite = self.check(id, secret)
        if invite.withdrawn:
            raise InviteWithdrawn("the invite was withdrawn: ask for a new one (`mesh invite`)")
        if invite.expires_at <= now:
            raise InviteExpired("the invite has expired: ask for a new one (`mesh invite`)")
        if removed_at >= invite.created_at:
            raise JoinerRemoved(
                "this node was removed from the mesh after the invite was made: ask for a new one"
            )
        repeated = joiner in invite.redeemed_by
        if not repeated:
            if invite.uses_left < 1:
                raise InviteUsedUp("the invite is used up: ask for a new one (`mesh invite`)")
            invite = replace(invite, redeemed_by=(*invite.redeemed_by, joiner))
            self._invites[id] = invite
        return Redemption(id, joiner, invite.mesh, invite.role, invite.uses_left, repeated)

    def withdraw(self, id: bytes) -> bool:
        """Nobody joins by this invite from now on. Says whether that is news."""
        invite = self._invites.get(id)
        if invite is None or invite.withdrawn:
            return False
        self._invites[id] = replace(invite, withdrawn=True)
        return True

    def forget_old(self, now: float) -> int:
        """Drops invites whose time has been over for `LISTED_AFTER_END_S`; says how many."""
        latest = now - LISTED_AFTER_END_S
        gone = [id for id, invite in self._invites.items() if invite.expires_at <= latest]
        for id in gone:
            del self._invites[id]
        return len(gone)

    def to_state(self) -> dict[str, Any]:
        """Plain JSON values, without any secret."""
        return {
            "format": _FORMAT,
            "invites": [
                {
                    "id": invite.id.hex(),
                    "secret_hash": invite.secret_hash.hex(),
                    "mesh": invite.mesh.hex(),
                    "role": invite.role.value,
                    "created_at": invite.created_at,
                    "expires_at": invite.expires_at,
                    "uses": invite.uses,
                    "redeemed_by": [str(peer) for peer in invite.redeemed_by],
                    "withdrawn": invite.withdrawn,
                }
                for invite in self._invites.values()
            ],
        }

    @classmethod
    def from_state_untrusted(cls, state: object) -> InviteBook:
        """The book `to_state` gave; raises `BadInviteState` and nothing else."""
        book = cls()
        try:
            if not isinstance(state, Mapping) or state["format"] != _FORMAT:
                raise BadInviteState("the saved invites are in a format this mesh does not know")
            for entry in state["invites"]:
                invite = _invite(entry)
                book._invites[invite.id] = invite
        except (KeyError, TypeError, ValueError, AttributeError, BadFrame) as error:
            raise BadInviteState("the saved invites are damaged") from error
        return book


def _invite(entry: Mapping[str, Any]) -> Invite:
    invite = Invite(
        id=bytes.fromhex(entry["id"]),
        secret_hash=bytes.fromhex(entry["secret_hash"]),
        mesh=bytes.fromhex(entry["mesh"]),
        role=Role(entry["role"]),
        created_at=_integer(entry["created_at"]),
        expires_at=_integer(entry["expires_at"]),
        uses=_integer(entry["uses"]),
        redeemed_by=tuple(parse_peer_id_untrusted(text) for text in entry["redeemed_by"]),
        withdrawn=entry["withdrawn"] is True,
    )
    lengths = (len(invite.id), len(invite.secret_hash), len(invite.mesh))
    if lengths != (ID_BYTES, _HASH_BYTES, KEY_BYTES):
        raise ValueError("wrong length")
    if invite.uses_left < 0 or invite.uses > MAX_USES:
        raise ValueError("impossible uses")
    return invite


def _integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError("not a whole number")
    return value


def secret_hash(secret: Secret) -> bytes:
    """What the book keeps of a secret."""
    return blake3(secret.reveal(), derive_key_context=_HASH_CONTEXT).digest()
